// SPDX-License-Identifier: MIT
//
// Waves: one multiplication in several passes, for a batch that wants more experts than there are slots, or for a
// lookup that waits for the disk and computes resident experts first.
//
// Each wave fills slots and runs a small graph that gathers the rows routed to their experts, multiplies them and
// scatters the results. All rows of an expert are in one wave, and no row's result depends on another row, so the
// output is the same bit for bit where the kernel is the same.
//
// With a link, the host waits for no wave: while one is computed, the next one's experts are copied into the other half
// of the slots. Each absent expert crosses the bus once, and a layer streams through a double buffer.
// Threading: one user thread at a time, under the lock of the pool that it runs over.

#pragma once

#include "link/slot_filler.hpp"
#include "model/paged_model.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <deque>
#include <vector>

namespace rotary {

// The experts that one wave pages in, and the rows of the lookup that it computes.
struct wave {
    size_t                   n_experts = 0;
    std::vector<rotary_load> loads;
    std::vector<int32_t>     rows;  // k + t * n_expert_used: the k-th expert of token t
    std::vector<int32_t>     slots; // the slot of each row's expert
};

// Jobs that fill a tensor's slots with these experts.
void add_jobs(const paged_tensor & tensor, const std::vector<rotary_load> & loads, std::vector<fill_job> & jobs);

class wave_runner {
  public:
    wave_runner(ggml_backend_t inner, slot_filler & filler) : inner_(inner), filler_(filler) {}

    bool make_events(); // create the events that waves with a link need, once; false if the inner device gives none

    // Plan waves for these ids and give their experts slots. `order`: the distinct ones, n_hits resident ones first.
    void plan(paged_model & model, const paged_layer & layer, const std::vector<int32_t> & ids,
              const std::vector<int32_t> & order, size_t n_hits);

    // Plan two waves for a lookup whose experts all have slots: the rows of resident experts, then those of `loads`.
    void plan_hits_first(const std::vector<int32_t> & ids, const std::vector<int32_t> & slot_ids,
                         const std::vector<rotary_load> & loads, size_t n_hits);

    const std::vector<wave> & planned() const { return waves_; }
    void                      forget_plan() { waves_.clear(); }
    void                      forget_in_flight() { in_flight_.clear(); } // once the inner backend is synchronized

    ggml_status run(paged_model & model, ggml_tensor * node, const paged_tensor & tensor);

  private:
    // For each row of a wave: its input row, its expert's slot, its output row.
    struct wave_rows {
        std::vector<int32_t> from, slots, to;
    };

    ggml_status run_wave(paged_model & model, ggml_tensor * node, const paged_tensor & tensor, const wave & now);
    bool        wait_for_slots(paged_model & model, const paged_layer & layer, size_t index);

    ggml_backend_t         inner_;
    slot_filler &          filler_;
    ggml_backend_event_ptr computed_[2]; // [i % 2] recorded on the inner backend after wave i
    std::vector<wave>      waves_;
    std::deque<wave_rows>  in_flight_;   // of waves whose rows the inner backend may still read
};

} // namespace rotary
