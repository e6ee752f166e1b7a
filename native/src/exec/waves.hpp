// SPDX-License-Identifier: MIT
//
// Waves: one multiplication in several passes.
//
// Each wave fills slots and multiplies the rows routed to their experts, gathered into a small graph of its own. An
// expert's rows are always all in one wave, and a row's result does not depend on the others, so the output is the same
// bit for bit where the kernel is the same. Waves serve a batch that wants more experts than there are slots, and a
// lookup that waits for the disk: the experts that are there are computed first.
//
// With a link, nobody waits for a wave: while one is computed, the next one's experts are copied, into the other half of
// the slots. So each absent expert crosses the bus once, and a layer streams through a double buffer.
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

// What one wave pages in and which (expert-used, token) rows of the lookup it computes.
struct wave {
    size_t                   n_experts = 0;
    std::vector<rotary_load> loads;
    std::vector<int32_t>     rows;  // k + t * n_expert_used
    std::vector<int32_t>     slots; // the slot of each row's expert
};

class wave_runner {
  public:
    wave_runner(ggml_backend_t inner, slot_filler & filler) : inner_(inner), filler_(filler) {}

    bool make_events(); // that waves need where a link copies, unless they are there; false if there are none

    // Waves for a lookup of these ids: distinct experts in `order`, of which the first n_hits are resident.
    void plan(paged_model & model, const paged_layer & layer, const std::vector<int32_t> & ids,
              const std::vector<int32_t> & order, size_t n_hits);

    // Two waves for a lookup whose experts all have slots: the rows of resident experts, then those that are still read.
    void plan_hits_first(const std::vector<int32_t> & ids, const std::vector<int32_t> & slot_ids,
                         const std::vector<rotary_load> & loads, size_t n_hits);

    const std::vector<wave> & planned() const { return waves_; }
    void                      forget_plan() { waves_.clear(); }
    void                      forget_in_flight() { in_flight_.clear(); } // the inner backend has been waited for

    ggml_status run(paged_model & model, ggml_tensor * node, const paged_tensor & tensor);

  private:
    // Of a wave's rows: where their input is, their experts' slots, where their output goes.
    struct wave_rows {
        std::vector<int32_t> from, slots, to;
    };

    ggml_status run_wave(paged_model & model, ggml_tensor * node, const paged_tensor & tensor, const wave & now);
    bool        wait_for_slots(paged_model & model, const paged_layer & layer, size_t index);

    ggml_backend_t         inner_;
    slot_filler &          filler_;
    ggml_backend_event_ptr computed_[2]; // the inner backend has come so far, after every other wave
    std::vector<wave>      waves_;
    std::deque<wave_rows>  in_flight_;   // of waves that the inner backend may not have taken yet
};

} // namespace rotary
