// SPDX-License-Identifier: MIT
//
// Transition: how often an expert is chosen after each expert that the layer before, or the one before that, has
// chosen. Learns the counts of these pairs as the model runs, and from a profile.

#include "prefetch/predictors/predictor.hpp"

#include <algorithm>

namespace rotary {

namespace {

class transition : public scoring_predictor {
  public:
    explicit transition(const predictor_setting & setting) :
        scoring_predictor(setting.n_expert), now_(setting.n_layers),
        alone_(setting.n_layers, std::vector<float>(setting.n_expert, 0)) {
        for (std::vector<std::vector<float>> & each : pairs_) {
            each.resize(setting.n_layers);
        }
    }

    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) override {
        if (layer <= last_) {
            std::for_each(now_.begin(), now_.end(), [](auto & each) { each.clear(); });
        }
        last_ = layer;
        for (int32_t t = 0; t < n_tokens; t++) {
            now_[layer].emplace_back(ids + t * n_used, ids + (t + 1) * n_used);
        }
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            alone_[layer][ids[i]] += 1;
        }
        for (int32_t distance = 1; distance <= n_ahead && distance <= layer; distance++) {
            const std::vector<std::vector<int32_t>> & before = now_[layer - distance];
            std::vector<float> &                      pairs  = table(distance, layer);
            const size_t                              n      = std::min(before.size(), now_[layer].size());
            for (size_t t = 1; t <= n; t++) {
                for (const int32_t from : before[before.size() - t]) {
                    for (const int32_t to : now_[layer][now_[layer].size() - t]) {
                        pairs[from * n_expert_ + to] += 1;
                    }
                }
            }
        }
    }

    void learn(int32_t layer, const float * popularity, const float * pairs, const float * popularity_before,
               int64_t n_tokens) override {
        const auto n = (double) n_tokens;
        for (int32_t expert = 0; expert < n_expert_; expert++) {
            alone_[layer][expert] += (float) (popularity[expert] * n);
        }
        for (int32_t i = 0; pairs != nullptr && i < n_expert_ * n_expert_; i++) {
            table(1, layer)[i] += (float) (pairs[i] * (popularity_before[i / n_expert_] * n));
        }
    }

    bool score(int32_t layer, int32_t ahead, std::vector<double> & score) override {
        const int32_t distance = ahead - layer;
        if (distance < 1 || distance > n_ahead || now_[layer].empty()) {
            return false;
        }
        const std::vector<float> & pairs = table(distance, ahead);
        for (const int32_t from : now_[layer].back()) {
            const double uses = (double) alone_[layer][from] + 1;
            for (int32_t to = 0; to < n_expert_; to++) {
                score[to] += (double) pairs[from * n_expert_ + to] / uses;
            }
        }
        return true;
    }

  private:
    static constexpr int32_t n_ahead = 2;

    // [n_expert][n_expert] by earlier and later expert; allocated when first used.
    std::vector<float> & table(int32_t distance, int32_t layer) {
        std::vector<float> & pairs = pairs_[distance - 1][layer];
        pairs.resize((size_t) n_expert_ * n_expert_, 0);
        return pairs;
    }

    int32_t                                        last_ = -1;
    std::vector<std::vector<std::vector<int32_t>>> now_;   // [n_layers][n_tokens][n_used] of this batch
    std::vector<std::vector<float>>                alone_; // [n_layers][n_expert] uses
    std::vector<std::vector<float>>                pairs_[n_ahead];
};

} // namespace

std::unique_ptr<scoring_predictor> transition_new(const predictor_setting & setting) {
    return std::make_unique<transition>(setting);
}

} // namespace rotary
