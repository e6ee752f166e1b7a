// SPDX-License-Identifier: MIT
//
// Statistics: the figures of one pool, for rotary_pool_stats().
//
// stats/ owns the record of what has happened: counters (here), recorded routings (trace.hpp) and notices to users
// (notices.hpp). Every room above counts here while a graph runs; the C API reads.
// Threading: any thread. Each of the three has its own lock, held briefly and never during a callback of the
// application, so that policies, predictors and log callbacks may ask for figures during a graph.

#pragma once

#include "base/fork.hpp"
#include "rotary.h"

#include <mutex>
#include <string>
#include <vector>

namespace rotary {

class statistics {
  public:
    // Change figures that are not counted by layer.
    template <typename function> void update(const function & change) {
        const std::lock_guard<std::mutex> lock(mutex_);
        change(totals_);
    }

    // Change those and one layer's figures.
    template <typename function> void update_layer(int32_t index, const function & change) {
        const std::lock_guard<std::mutex> lock(mutex_);
        change(totals_, layers_[index]);
    }

    // Replace the list of paged layers, and their counters.
    void set_layers(std::vector<rotary_layer_stats> layers);
    void set_slots(int32_t index, int32_t n_slots, int32_t n_resident);
    void set_scratch_bytes(uint64_t bytes); // activations of waves, included in staging_bytes

    // Add one lookup of a layer, which leaves n_resident of its experts resident.
    void count_lookup(int32_t index, const rotary_layer_stats & delta, int32_t n_resident);

    rotary_stats all() const; // n_notices is 0: notices count themselves
    bool         layer(int32_t index, rotary_layer_stats & out) const;

    void reset();
    bool take_reset(); // whether reset() was called since the last take_reset(): the store counts reads itself
    void print(const std::string & model, const char * inner) const; // one line on stderr

  private:
    mutable fork_mutex              mutex_;
    rotary_stats                    totals_ = {}; // all that is not counted by layer
    std::vector<rotary_layer_stats> layers_;
    uint64_t                        scratch_bytes_ = 0;
    bool                            was_reset_     = false;
};

} // namespace rotary
