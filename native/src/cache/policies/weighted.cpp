// SPDX-License-Identifier: MIT
//
// Like lfu, but a use counts by the square root of the router's weight, where that is known: an expert that was barely
// chosen is less likely to be wanted again.

#include "cache/policies/policy.hpp"

#include <cmath>

namespace rotary {

namespace {

class weighted : public valued_policy {
  public:
    explicit weighted(int32_t n_expert) : valued_policy(n_expert) { clock = 1; }

    bool wants_weights() const override { return true; }

    void note(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens) override {
        static constexpr double keep = 0.95;

        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            clock /= i % n_used == 0 ? keep : 1;
            value[ids[i]] += weights != nullptr ? clock * std::sqrt((double) weights[i]) : clock;
        }
        scale_down(1e100);
    }
};

} // namespace

std::unique_ptr<policy> weighted_new(const policy_setting & setting) {
    return std::make_unique<weighted>(setting.n_expert);
}

} // namespace rotary
