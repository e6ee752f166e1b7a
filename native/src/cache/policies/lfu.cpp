// SPDX-License-Identifier: MIT
//
// Least frequently used, where older uses count less: with each token, all earlier uses lose a twentieth of their
// worth. Values are not shrunk for that; each new use adds more instead.
// Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used policies",
// IEEE Transactions on Computers 50, 2001.

#include "cache/page_table.h"
#include "cache/policies/policy.hpp"

namespace rotary {

namespace {

class lfu : public valued_policy {
  public:
    explicit lfu(int32_t n_expert) : valued_policy(n_expert) {
        clock  = 1;
        growth = 1 / 0.95;
    }

    void note(const int32_t * ids, const float *, int32_t n_used, int32_t n_tokens) override {
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            clock *= i % n_used == 0 ? growth : 1;
            value[ids[i]] += clock;
        }
        scale_down(ROTARY_PAGE_MAX_GAIN);
    }

    valued_policy * on_device() override { return this; }
};

} // namespace

std::unique_ptr<policy> lfu_new(const policy_setting & setting) {
    return std::make_unique<lfu>(setting.n_expert);
}

} // namespace rotary
