// SPDX-License-Identifier: MIT
//
// Router. See router.hpp.

#include "prefetch/router.hpp"

#include "base/inner_device.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace rotary {

// ---- router

void router::set(const std::vector<float> & weight, const std::vector<float> & norm, const std::vector<float> & bias,
                 const std::vector<float> & selection, int64_t n_embd) {
    n_expert_  = (int32_t) (weight.size() / n_embd);
    norm_      = norm.empty() ? std::vector<float>(n_embd, 1.0f) : norm;
    bias_      = bias.empty() ? std::vector<float>(n_expert_, 0.0f) : bias;
    selection_ = selection;

    std::vector<float> folded = weight;
    for (size_t i = 0; i < folded.size(); i++) {
        folded[i] *= norm_[i % n_embd];
    }
    type_ = n_embd % ggml_blck_size(GGML_TYPE_Q8_0) == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F32;
    weight_.resize(ggml_row_size(type_, n_embd) * n_expert_);
    if (type_ == GGML_TYPE_F32) {
        memcpy(weight_.data(), folded.data(), weight_.size());
    } else {
        ggml_quantize_chunk(type_, folded.data(), weight_.data(), 0, n_expert_, n_embd, nullptr);
    }
}

void router::unweight(const float * hidden, float * normed) const {
    for (size_t i = 0; i < norm_.size(); i++) {
        normed[i] = norm_[i] != 0.0f ? hidden[i] / norm_[i] : 0.0f;
    }
}

void router::choose(const float * products, int32_t n_used, std::vector<int32_t> & experts) const {
    std::vector<float> score(n_expert_);
    for (int32_t expert = 0; expert < n_expert_; expert++) {
        const float logit = products[expert] + bias_[expert];
        score[expert]     = selection_.empty() ? logit : 1.0f / (1.0f + std::exp(-logit)) + selection_[expert];
    }
    experts.resize(n_expert_);
    std::iota(experts.begin(), experts.end(), 0);
    n_used = std::min(n_used, n_expert_);
    std::partial_sort(experts.begin(), experts.begin() + n_used, experts.end(),
                      [&](int32_t a, int32_t b) { return score[a] > score[b]; });
    experts.resize(n_used);
}

// ---- multiplying

router_products::router_products(ggml_backend_t inner) : cpu_(inner) {
    if (!inner_is_cpu(ggml_backend_get_device(inner))) {
        own_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        cpu_ = own_.get();
    }
}

bool router_products::multiply(const std::vector<router *> & routers, std::vector<float> & normed, int64_t n_tokens,
                               std::vector<const float *> & products) {
    static constexpr size_t max_nodes = 16;

    if (cpu_ == nullptr || routers.size() * 3 > max_nodes) {
        return false;
    }
    if (!context_) {
        context_.reset(ggml_init(
            { ggml_tensor_overhead() * max_nodes + ggml_graph_overhead_custom(max_nodes, false), nullptr, true }));
    }
    ggml_reset(context_.get());
    size_t n_products = 0;
    for (const router * each : routers) {
        n_products += each->n_expert() * n_tokens;
    }
    products_.resize(n_products);
    products.clear();

    ggml_cgraph * graph = ggml_new_graph_custom(context_.get(), max_nodes, false);
    float *       out   = products_.data();
    for (router * each : routers) {
        ggml_tensor * state  = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, each->n_embd(), n_tokens);
        ggml_tensor * weight = ggml_new_tensor_2d(context_.get(), each->type(), each->n_embd(), each->n_expert());
        ggml_tensor * node   = ggml_mul_mat(context_.get(), weight, state);
        state->data          = normed.data();
        weight->data         = each->weight();
        node->data           = out;
        products.push_back(out);
        out += each->n_expert() * n_tokens;
        ggml_build_forward_expand(graph, node);
    }
    return ggml_backend_graph_compute(cpu_, graph) == GGML_STATUS_SUCCESS;
}

} // namespace rotary
