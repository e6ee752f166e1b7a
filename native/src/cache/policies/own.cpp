// SPDX-License-Identifier: MIT
//
// The caller's own policy, for example in Python: rotary_policy in rotary.h.

#include "cache/policies/policy.hpp"

#include <algorithm>

namespace rotary {

namespace {

class own : public policy {
  public:
    own(const rotary_policy & calls, int32_t il) : calls_(calls), il_(il) {}

    bool wants_weights() const override { return true; }

    void note(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens) override {
        calls_.note(calls_.user, il_, ids, weights, n_used, n_tokens);
    }
    void enter(int32_t expert, bool wanted) override { calls_.enter(calls_.user, il_, expert, wanted); }
    void leave(int32_t expert) override { calls_.leave(calls_.user, il_, expert); }
    void resize(int32_t n_slots) override { calls_.resize(calls_.user, il_, n_slots); }

    int32_t choose(const std::vector<int32_t> & candidates) override {
        const int32_t expert = calls_.choose(calls_.user, il_, candidates.data(), (int32_t) candidates.size());
        const bool    known  = std::find(candidates.begin(), candidates.end(), expert) != candidates.end();
        return known ? expert : candidates[0];
    }

  private:
    const rotary_policy calls_;
    int32_t             il_;
};

} // namespace

std::unique_ptr<policy> own_new(const policy_setting & setting) {
    return std::make_unique<own>(*setting.own, setting.il);
}

} // namespace rotary
