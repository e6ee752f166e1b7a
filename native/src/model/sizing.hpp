// SPDX-License-Identifier: MIT
//
// Sizing: from a budget to slots: the budget in bytes, each layer's number of slots, and their allocation. A budget
// "auto" is lowered until its slots can be allocated.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/first_fill.hpp"
#include "model/paged_model.hpp"

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace rotary {

class sizing {
  public:
    explicit sizing(paged_model & model) : model_(model) {}

    // Choose the store, open the link, divide the budget and allocate. Returns the status, which lasts until release().
    int32_t run();
    int32_t status() const;                                     // what run() returned, with this thread's error

    bool     is_done() const { return done_; }                  // run() was called, even if it failed
    bool     has_slots() const { return done_ && status_ == ROTARY_OK; }
    uint64_t max_slot_bytes() const { return max_slot_bytes_; } // to which slots may grow
    void     release() { done_ = false, status_ = ROTARY_OK; }

    first_fill & fill() { return fill_; }
    const char * policy() const { return policy_; } // static name of the chosen policy; "" before run()

  private:
    int32_t              allocate(uint64_t bytes, const std::vector<int32_t> & n_slots);
    int32_t              allocate(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated);
    void                 lay_out(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated);
    std::vector<int32_t> with_room_to_grow(const std::vector<int32_t> & n_slots) const;
    std::vector<int32_t> with_room_to_rebalance(const std::vector<int32_t> & n_slots,
                                                const std::vector<int32_t> & n_allocated) const;
    void                 show_layers(const std::vector<int32_t> & n_slots) const;
    bool                 is_automatic() const { return model_.config.wanted.what == budget::kind::automatic; }

    paged_model &             model_;
    first_fill                fill_;
    bool                      done_   = false;
    int32_t                   status_ = ROTARY_OK;
    std::string               error_; // the text for status_
    uint64_t                  max_slot_bytes_ = 0;
    std::atomic<const char *> policy_{ "" };
};

} // namespace rotary
