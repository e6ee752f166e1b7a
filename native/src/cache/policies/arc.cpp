// SPDX-License-Identifier: MIT
//
// ARC: two lists of resident experts, those used once since they entered and those used again, each least recently used
// first. A miss on an expert that was recently evicted from a list raises that list's share of the slots. Experts that
// must not be evicted now are skipped.
// Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.

#include "cache/policies/policy.hpp"

#include <algorithm>
#include <deque>

namespace rotary {

namespace {

class arc : public policy {
  public:
    explicit arc(int32_t n_slots) : n_slots_(n_slots) {}

    void note(const int32_t * ids, const float *, int32_t n_used, int32_t n_tokens) override {
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            if (take(once_, ids[i]) || take(again_, ids[i])) {
                again_.push_back(ids[i]);
            }
        }
    }
    void enter(int32_t expert, bool) override {
        const double once = (double) once_gone_.size(), again = (double) again_gone_.size();
        if (take(once_gone_, expert)) {
            share_ = std::min(share_ + std::max(again / once, 1.0), (double) n_slots_);
            again_.push_back(expert);
        } else if (take(again_gone_, expert)) {
            share_ = std::max(share_ - std::max(once / again, 1.0), 0.0);
            again_.push_back(expert);
        } else {
            once_.push_back(expert);
        }
    }
    void leave(int32_t expert) override {
        const bool            once = take(once_, expert);
        std::deque<int32_t> & gone = once ? once_gone_ : again_gone_;
        if (!once) {
            take(again_, expert);
        }
        gone.push_back(expert);
        shorten(gone);
    }
    void resize(int32_t n_slots) override {
        n_slots_ = n_slots;
        share_   = std::min(share_, (double) n_slots);
        shorten(once_gone_);
        shorten(again_gone_);
    }

    int32_t choose(const std::vector<int32_t> & candidates) override {
        const bool from_once = !once_.empty() && (double) once_.size() > share_;
        for (const std::deque<int32_t> * list : { from_once ? &once_ : &again_, from_once ? &again_ : &once_ }) {
            for (const int32_t expert : *list) {
                if (std::find(candidates.begin(), candidates.end(), expert) != candidates.end()) {
                    return expert;
                }
            }
        }
        return candidates[0];
    }

  private:
    static bool take(std::deque<int32_t> & list, int32_t expert) {
        const auto it    = std::find(list.begin(), list.end(), expert);
        const bool there = it != list.end();
        if (there) {
            list.erase(it);
        }
        return there;
    }
    void shorten(std::deque<int32_t> & list) const {
        while (list.size() > (size_t) n_slots_) {
            list.pop_front();
        }
    }

    int32_t             n_slots_;
    std::deque<int32_t> once_, again_, once_gone_, again_gone_; // least recently used first
    double              share_ = 0;                             // slots for once_
};

} // namespace

std::unique_ptr<policy> arc_new(const policy_setting & setting) {
    return std::make_unique<arc>(setting.n_slots);
}

} // namespace rotary
