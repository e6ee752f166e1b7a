// SPDX-License-Identifier: MIT
//
// Own: a predictor implemented by the caller, in Python for example. See rotary_predictor in rotary.h.

#include "prefetch/predictors/predictor.hpp"

#include <algorithm>

namespace rotary {

namespace {

class own : public predictor {
  public:
    explicit own(const predictor_setting & setting) : calls_(*setting.own), n_expert_(setting.n_expert) {}

    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) override {
        calls_.note(calls_.user, layer, ids, n_used, n_tokens);
    }

    void name(int32_t layer, int32_t ahead, int32_t n, std::vector<int32_t> & experts) override {
        experts.resize(n);
        const int32_t named = calls_.name(calls_.user, layer, ahead, experts.data(), n);
        experts.resize(std::clamp(named, 0, n));
        experts.erase(std::remove_if(experts.begin(), experts.end(),
                                     [&](int32_t expert) { return expert < 0 || expert >= n_expert_; }),
                      experts.end());
    }

  private:
    const rotary_predictor calls_;
    int32_t                n_expert_;
};

} // namespace

std::unique_ptr<predictor> own_predictor_new(const predictor_setting & setting) {
    return std::make_unique<own>(setting);
}

} // namespace rotary
