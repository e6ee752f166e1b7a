// SPDX-License-Identifier: MIT
//
// Least recently used. Each appearance of an id is a use, in the order of ids[]. Experts that were prefetched and not
// used are evicted first, the latest of them before the others.

#include "cache/policies/policy.hpp"

namespace rotary {

namespace {

class lru : public valued_policy {
  public:
    using valued_policy::valued_policy;

    void note(const int32_t * ids, const float *, int32_t n_used, int32_t n_tokens) override {
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            value[ids[i]] = ++clock;
        }
    }
    void enter(int32_t expert, bool wanted) override { value[expert] = wanted ? value[expert] : --unused_value; }

    valued_policy * on_device() override { return this; }
};

} // namespace

std::unique_ptr<policy> lru_new(const policy_setting & setting) {
    return std::make_unique<lru>(setting.n_expert);
}

} // namespace rotary
