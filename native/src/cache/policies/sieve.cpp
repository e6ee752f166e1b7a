// SPDX-License-Identifier: MIT
//
// SIEVE: a queue in order of arrival, a hand that moves from oldest to newest, and a mark on experts used since it
// passed. The victim is the first without a mark; experts that must not be evicted now are skipped with their marks.
// Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web caches", NSDI 2024.

#include "cache/policies/policy.hpp"

#include <algorithm>

namespace rotary {

namespace {

class sieve : public policy {
  public:
    explicit sieve(int32_t n_expert) : marked_(n_expert, false) {}

    void note(const int32_t * ids, const float *, int32_t n_used, int32_t n_tokens) override {
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            marked_[ids[i]] = std::find(queue_.begin(), queue_.end(), ids[i]) != queue_.end();
        }
    }
    void enter(int32_t expert, bool) override { queue_.push_back(expert); }
    void leave(int32_t expert) override {
        const auto it = std::find(queue_.begin(), queue_.end(), expert);
        hand_ -= it - queue_.begin() < hand_;
        queue_.erase(it);
        marked_[expert] = false;
    }

    int32_t choose(const std::vector<int32_t> & candidates) override {
        while (true) { // at most two rounds: the first one removes the marks
            hand_                = hand_ < (int64_t) queue_.size() ? hand_ : 0;
            const int32_t expert = queue_[hand_];
            if (std::find(candidates.begin(), candidates.end(), expert) != candidates.end()) {
                if (!marked_[expert]) {
                    return expert;
                }
                marked_[expert] = false;
            }
            hand_++;
        }
    }

  private:
    std::vector<int32_t> queue_;    // oldest first
    std::vector<bool>    marked_;   // [n_expert]
    int64_t              hand_ = 0; // index in the queue
};

} // namespace

std::unique_ptr<policy> sieve_new(const policy_setting & setting) {
    return std::make_unique<sieve>(setting.n_expert);
}

} // namespace rotary
