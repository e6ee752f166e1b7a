// SPDX-License-Identifier: MIT
//
// Predictor. See predictor.hpp.

#include "predictor.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace rotary {

void router::set(const std::vector<float> & weight, const std::vector<float> & norm, const std::vector<float> & bias,
                 const std::vector<float> & selection, int64_t n_embd) {
    n_expert_ = (int32_t) (weight.size() / n_embd);
    norm_     = norm.empty() ? std::vector<float>(n_embd, 1.0f) : norm;
    bias_     = bias.empty() ? std::vector<float>(n_expert_, 0.0f) : bias;
    selection_ = selection;
    rows_.resize(weight.size());
    scale_.resize(n_expert_);
    for (int32_t expert = 0; expert < n_expert_; expert++) {
        const float * row  = &weight[expert * n_embd];
        float         most = 0.0f;
        for (int64_t i = 0; i < n_embd; i++) {
            most = std::max(most, std::fabs(row[i] * norm_[i]));
        }
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        scale_[expert]      = most / 127.0f;
        for (int64_t i = 0; i < n_embd; i++) {
            rows_[expert * n_embd + i] = (int8_t) std::lround(row[i] * norm_[i] * inverse);
        }
    }
}

void router::unweight(const float * hidden, float * normed) const {
    for (size_t i = 0; i < norm_.size(); i++) {
        normed[i] = norm_[i] != 0.0f ? hidden[i] / norm_[i] : 0.0f;
    }
}

// Eight sums at a time, so that the compiler may use vectors without being allowed to reorder a single sum.
#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target_clones("arch=haswell", "default")))
#endif
static float
dot(const int8_t * a, const float * b, int64_t n) {
    float   sums[16] = { 0.0f };
    int64_t i        = 0;
    for (; i + 16 <= n; i += 16) {
        for (int k = 0; k < 16; k++) {
            sums[k] += (float) a[i + k] * b[i + k];
        }
    }
    float sum = std::accumulate(sums, sums + 16, 0.0f);
    for (; i < n; i++) {
        sum += (float) a[i] * b[i];
    }
    return sum;
}

void router::choose(const float * normed, int32_t n_used, std::vector<int32_t> & experts) {
    score_.resize(n_expert_);
    for (int32_t expert = 0; expert < n_expert_; expert++) {
        const float logit = scale_[expert] * dot(&rows_[expert * norm_.size()], normed, n_embd()) + bias_[expert];
        score_[expert]    = selection_.empty() ? logit : 1.0f / (1.0f + std::exp(-logit)) + selection_[expert];
    }
    experts.resize(n_expert_);
    std::iota(experts.begin(), experts.end(), 0);
    n_used = std::min(n_used, n_expert_);
    std::partial_sort(experts.begin(), experts.begin() + n_used, experts.end(),
                      [&](int32_t a, int32_t b) { return score_[a] > score_[b]; });
    experts.resize(n_used);
}

} // namespace rotary
