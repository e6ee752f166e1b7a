// SPDX-License-Identifier: MIT
//
// Previous: the experts that the layer chose for the token before.

#include "prefetch/predictors/predictor.hpp"

#include <algorithm>

namespace rotary {

namespace {

class previous : public predictor {
  public:
    explicit previous(int32_t n_layers) : last_(n_layers) {}

    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) override {
        last_[layer].assign(ids + n_used * (n_tokens - 1), ids + n_used * n_tokens);
    }

    void name(int32_t, int32_t ahead, int32_t n, std::vector<int32_t> & experts) override {
        experts = last_[ahead];
        experts.resize(std::min(experts.size(), (size_t) n));
    }

  private:
    std::vector<std::vector<int32_t>> last_; // [n_layers]
};

} // namespace

std::unique_ptr<predictor> previous_new(const predictor_setting & setting) {
    return std::make_unique<previous>(setting.n_layers);
}

} // namespace rotary
