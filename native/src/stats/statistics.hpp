// SPDX-License-Identifier: MIT
//
// Statistics: the figures of one pool, as rotary_pool_stats() shows them.
//
// stats/ owns what has happened: counters (here), recorded routings (trace.hpp) and what users should know (notices.hpp).
// Every room above counts here while a graph runs; the C API reads.
// Threading: any thread. Each of the three has a lock of its own, held for moments and never while anything of the caller's
// is called, so that policies, predictors and log callbacks may ask for figures amid a graph.

#pragma once

#include "base/fork.hpp"
#include "rotary.h"

#include <mutex>
#include <string>
#include <vector>

namespace rotary {

class statistics {
  public:
    // Change what is not counted by layer.
    template <typename function> void update(const function & change) {
        const std::lock_guard<std::mutex> lock(mutex_);
        change(totals_);
    }

    // Change that and one layer's figures.
    template <typename function> void update_layer(int32_t index, const function & change) {
        const std::lock_guard<std::mutex> lock(mutex_);
        change(totals_, layers_[index]);
    }

    // The layers that are paged from now on, with what is known of each; none while slots are not allocated.
    void set_layers(std::vector<rotary_layer_stats> layers);
    void set_slots(int32_t index, int32_t n_slots, int32_t n_resident);
    void set_scratch_bytes(uint64_t bytes); // activations of waves, part of staging_bytes

    // Add one lookup of a layer, which leaves so many experts resident.
    void count_lookup(int32_t index, const rotary_layer_stats & delta, int32_t n_resident);

    rotary_stats all() const; // without n_notices
    bool         layer(int32_t index, rotary_layer_stats & out) const;

    void reset();
    bool take_reset(); // whether reset() was called since: reads are counted elsewhere
    void print(const std::string & model, const char * inner) const; // one line on stderr

  private:
    mutable fork_mutex              mutex_;
    rotary_stats                    totals_ = {}; // what layers do not count themselves
    std::vector<rotary_layer_stats> layers_;
    uint64_t                        scratch_bytes_ = 0;
    bool                            was_reset_     = false;
};

} // namespace rotary
