// SPDX-License-Identifier: MIT
//
// S3-FIFO: a small queue for new experts, a main one for those used again there or remembered on return, and a list
// that remembers those evicted from the small one. Experts that must not be evicted now are skipped unchanged.
// Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

#include "cache/policies/policy.hpp"

#include <algorithm>
#include <deque>

namespace rotary {

namespace {

class s3fifo : public policy {
  public:
    s3fifo(int32_t n_expert, int32_t n_slots) : uses_(n_expert, 0) { resize(n_slots); }

    void note(const int32_t * ids, const float *, int32_t n_used, int32_t n_tokens) override {
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            if (in(small_, ids[i]) || in(main_, ids[i])) {
                uses_[ids[i]] = std::min(uses_[ids[i]] + 1, 3);
            }
        }
    }
    void enter(int32_t expert, bool) override {
        const auto ghost = std::find(ghosts_.begin(), ghosts_.end(), expert);
        if (ghost != ghosts_.end()) {
            ghosts_.erase(ghost);
            main_.push_back(expert);
        } else {
            small_.push_back(expert);
        }
        uses_[expert] = 0;
    }
    void leave(int32_t expert) override {
        const auto it = std::find(small_.begin(), small_.end(), expert);
        if (it == small_.end()) {
            main_.erase(std::find(main_.begin(), main_.end(), expert));
            return;
        }
        small_.erase(it);
        ghosts_.push_back(expert);
        shorten();
    }
    void resize(int32_t n_slots) override {
        max_small_  = std::max(1, n_slots / 10);
        max_ghosts_ = n_slots;
        shorten();
    }

    int32_t choose(const std::vector<int32_t> & candidates) override {
        for (size_t i = 0; small_.size() >= max_small_ && i < small_.size();) {
            const int32_t expert = small_[i];
            if (!in(candidates, expert)) {
                i++;
            } else if (uses_[expert] <= 1) {
                return expert;
            } else {
                small_.erase(small_.begin() + (int64_t) i);
                main_.push_back(expert);
                uses_[expert] = 0;
            }
        }
        const bool any = std::any_of(main_.begin(), main_.end(), [&](int32_t each) { return in(candidates, each); });
        for (size_t i = 0; any;) {
            i                    = i < main_.size() ? i : 0;
            const int32_t expert = main_[i];
            if (!in(candidates, expert)) {
                i++;
            } else if (uses_[expert] == 0) {
                return expert;
            } else {
                uses_[expert]--;
                main_.erase(main_.begin() + (int64_t) i);
                main_.push_back(expert);
            }
        }
        return *std::find_if(small_.begin(), small_.end(), [&](int32_t each) { return in(candidates, each); });
    }

  private:
    template <typename Queue> static bool in(const Queue & queue, int32_t expert) {
        return std::find(queue.begin(), queue.end(), expert) != queue.end();
    }

    void shorten() {
        while (ghosts_.size() > max_ghosts_) {
            ghosts_.pop_front();
        }
    }

    std::deque<int32_t>  small_, main_, ghosts_; // oldest first
    std::vector<int32_t> uses_;                  // [n_expert] uses since it entered a queue less sparings, at most 3
    size_t               max_small_ = 1, max_ghosts_ = 1;
};

} // namespace

std::unique_ptr<policy> s3fifo_new(const policy_setting & setting) {
    return std::make_unique<s3fifo>(setting.n_expert, setting.n_slots);
}

} // namespace rotary
