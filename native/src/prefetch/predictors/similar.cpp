// SPDX-License-Identifier: MIT
//
// Similar: the experts chosen by the earlier tokens whose routing in the layers so far is most like this token's. The
// idea is that of the eviction policy recall, applied within one token.

#include "prefetch/predictors/predictor.hpp"

#include <algorithm>
#include <deque>

namespace rotary {

namespace {

class similar : public scoring_predictor {
  public:
    explicit similar(const predictor_setting & setting) :
        scoring_predictor(setting.n_expert), n_layers_(setting.n_layers), noted_in_(setting.n_expert, -1) {}

    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) override {
        if (layer <= last_ || tokens_.empty()) {
            tokens_.resize(tokens_.size() + std::min<size_t>(n_tokens, window + 1), token(n_layers_));
            while (tokens_.size() > window + 1) {
                tokens_.pop_front();
            }
            shared_.assign(tokens_.size() - 1, 0);
            n_chosen_ = 0;
        }
        last_ = layer;
        for (int32_t t = 1; t <= std::min(n_tokens, (int32_t) tokens_.size()); t++) {
            const int32_t * row = ids + (n_tokens - t) * n_used;
            tokens_[tokens_.size() - t][layer].assign(row, row + n_used);
        }
        n_chosen_ += n_used;
        n_noted_++;
        for (const int32_t expert : tokens_.back()[layer]) {
            noted_in_[expert] = n_noted_;
        }
        for (size_t i = 0; i < shared_.size(); i++) {
            const std::vector<int32_t> & then = tokens_[i][layer];
            shared_[i] +=
                std::count_if(then.begin(), then.end(), [&](int32_t expert) { return noted_in_[expert] == n_noted_; });
        }
    }

    // An earlier token's weight is the fourth power of the share of experts that it has in common with the last one.
    bool score(int32_t, int32_t ahead, std::vector<double> & score) override {
        double sum = 0;
        for (size_t i = 0; i < shared_.size(); i++) {
            const double alike  = (double) shared_[i] / (double) n_chosen_;
            const double weight = alike * alike * alike * alike;
            for (const int32_t expert : tokens_[i][ahead]) {
                score[expert] += weight;
            }
            sum += weight;
        }
        for (double & each : score) {
            each /= sum + 1e-9;
        }
        return true;
    }

  private:
    static constexpr size_t window = 192;            // earlier tokens that are kept

    using token = std::vector<std::vector<int32_t>>; // [n_layers][n_used]

    int32_t              n_layers_;
    int32_t              last_ = -1;
    std::deque<token>    tokens_;       // the earlier tokens, then the last one
    std::vector<int64_t> shared_;       // [earlier token] experts in common with the last one so far
    int64_t              n_chosen_ = 0; // experts chosen by the last one so far
    std::vector<int64_t> noted_in_;     // [n_expert] number of the last note() with the expert
    int64_t              n_noted_ = 0;
};

} // namespace

std::unique_ptr<scoring_predictor> similar_new(const predictor_setting & setting) {
    return std::make_unique<similar>(setting);
}

} // namespace rotary
