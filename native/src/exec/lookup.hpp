// SPDX-License-Identifier: MIT
//
// Lookup: one layer's routing in a graph, resolved once for all tensors that share it: which experts it wants, which
// slots they get, which bytes must be read now, and what to prefetch for the layers after it.
//
// With the direct store, reads of absent experts start as soon as the routing is known, prefetches after them. A
// tensor's slots are filled just before its own node runs, so the nodes before it are computed meanwhile.
// Threading: one user thread at a time, under the lock of the pool that the graph runs over.

#pragma once

#include "exec/device_lookup.hpp"
#include "exec/waves.hpp"
#include "link/slot_filler.hpp"
#include "pool/pool.hpp"
#include "prefetch/prefetcher.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace rotary {

class lookup {
  public:
    // How the layer's nodes compute: straight from the mapping; with all experts resident, expert e in slot e; with ids
    // rewritten to slots; in several passes; with ids that the inner device rewrites.
    enum class mode { mapped, resident, slots, waves, on_device };

    explicit lookup(ggml_backend_t inner) :
        inner_(inner), filler_(inner), prefetcher_(inner), waves_(inner, filler_), device_(inner) {}

    // Create the events that copies by a link need, unless they exist. False with this thread's error; may be retried.
    bool make_events();
    void begin_graph();
    bool end_graph(pool & pool) { return device_.end_graph(pool); } // false with this thread's error
    void forget();

    // Whether the current lookup is the one of this layer and ids tensor.
    bool matches(const paged_layer & layer, const ggml_tensor * ids) const {
        return now_.layer == &layer && now_.ids == ids;
    }
    mode current_mode() const { return now_.mode; }

    // Begin the lookup for node i; the previous one must be finished. For a layer with slots, and for a trace, the
    // nodes before i must have been submitted.
    ggml_status resolve(pool & pool, paged_layer & layer, const ggml_cgraph * graph, int i);
    ggml_status finish(pool & pool); // fill the slots of tensors that the graph did not use

    // Whether a tensor's slots have been filled, or its waves have run.
    bool is_done(const paged_tensor & tensor) const;

    ggml_status fill(paged_model & model, const paged_tensor & tensor);
    ggml_status run_waves(paged_model & model, ggml_tensor * node, const paged_tensor & tensor);

    // Whether reads will take long enough to compute a node in two passes, the rows of resident experts first.
    bool        worth_splitting(const paged_model & model, const ggml_tensor * node) const;
    ggml_status run_hits_first(paged_model & model, ggml_tensor * node, const paged_tensor & tensor);

  private:
    struct state {
        paged_layer *                     layer = nullptr;
        const ggml_tensor *               ids   = nullptr;
        lookup::mode                      mode  = lookup::mode::mapped;
        std::vector<paged_tensor *>       order;      // the layer's tensors, in the order in which the graph uses them
        std::vector<rotary_load>          loads;      // mode slots: the absent experts
        size_t                            n_hits = 0; // distinct experts that are resident
        std::vector<const paged_tensor *> done;
    };

    ggml_status        resolve_on_host(pool & pool, const ggml_cgraph * graph, int i);
    void               read_ids(paged_model & model);
    std::vector<float> read_weights(const paged_model & model, const ggml_cgraph * graph, int i) const;
    void               record(paged_model & model, const std::vector<float> & weights) const;
    bool               distinct_experts(const paged_model & model, std::vector<int32_t> & experts) const;
    bool               place_in_slots(paged_model & model, rotary_layer_stats & delta);
    void               start_reads(pool & pool, const std::vector<int32_t> & experts, const ggml_tensor * node);
    void               demand(paged_model & model);
    ggml_status        fill_ready(paged_model & model);
    ggml_status        fill(paged_model & model, const std::vector<fill_job> & jobs) {
        return filler_.fill(model.store, model.transfer, model.stats, jobs);
    }

    ggml_backend_t       inner_;
    slot_filler          filler_;
    prefetcher           prefetcher_;
    wave_runner          waves_;
    device_lookups       device_;
    state                now_;
    std::vector<int32_t> ids_; // [n_tokens][n_expert_used] of the current lookup
    std::vector<char>    raw_ids_;
};

} // namespace rotary
