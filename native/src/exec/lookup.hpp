// SPDX-License-Identifier: MIT
//
// Lookup: the routing of one layer in a graph, resolved once for all tensors that share it: which experts are wanted, which
// slots they get, what has to be read for that and what may be read for the layers after it.
//
// With the direct store, the reads of all absent experts start when the routing is resolved, then those that the next
// layers will probably want; each tensor's slots are filled just before its own node, so what precedes it is computed
// meanwhile.
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
    // How a lookup's nodes compute: from the mapping as it is; with every expert in its slot; with ids rewritten to slots; in
    // several passes; with ids that the inner device has rewritten itself.
    enum class mode { mapped, resident, slots, waves, on_device };

    explicit lookup(ggml_backend_t inner) :
        inner_(inner), filler_(inner), prefetcher_(inner), waves_(inner, filler_), device_(inner) {}

    bool
    make_events(); // all that work with a link needs; false with this thread's error, and tried again the next time
    void begin_graph();
    bool end_graph(pool & pool) { return device_.end_graph(pool); } // false with this thread's error
    void forget();

    // Whether the current lookup is that of this layer and routing.
    bool is_of(const paged_layer & layer, const ggml_tensor * ids) const {
        return now_.layer == &layer && now_.ids == ids;
    }
    mode how() const { return now_.how; }

    // Begin the lookup of a layer at node i, whose routing has been computed. Then the one before must be finished.
    ggml_status resolve(pool & pool, paged_layer & layer, const ggml_cgraph * graph, int i);
    ggml_status finish(pool & pool); // fill what the graph did not use of the current lookup

    // Whether a tensor's slots are filled, or it has been through the waves.
    bool is_done(const paged_tensor & tensor) const;

    ggml_status fill(paged_model & model, const paged_tensor & tensor);
    ggml_status run_waves(paged_model & model, ggml_tensor * node, const paged_tensor & tensor);

    // Whether a node is worth computing in two passes while reads go on: the rows of resident experts first.
    bool        worth_splitting(const paged_model & model, const ggml_tensor * node) const;
    ggml_status run_hits_first(paged_model & model, ggml_tensor * node, const paged_tensor & tensor);

  private:
    struct state {
        paged_layer *                     layer = nullptr;
        const ggml_tensor *               ids   = nullptr;
        mode                              how   = mode::mapped;
        std::vector<paged_tensor *>       order;      // the layer's tensors as the graph uses them
        std::vector<rotary_load>          loads;      // mode slots: what is absent
        size_t                            n_hits = 0; // mode slots: experts that are there
        std::vector<const paged_tensor *> done;
    };

    ggml_status        resolve_on_host(pool & pool, const ggml_cgraph * graph, int i);
    void               read_ids(paged_model & model);
    std::vector<float> read_weights(const paged_model & model, const ggml_cgraph * graph, int i) const;
    void               record(paged_model & model, const std::vector<float> & weights) const;
    bool               distinct_experts(const paged_model & model, std::vector<int32_t> & experts) const;
    bool               place_in_slots(paged_model & model, rotary_layer_stats & delta);
    void               read_ahead(pool & pool, const std::vector<int32_t> & experts, const ggml_tensor * node);
    void               demand(paged_model & model);
    ggml_status        fill_landed(paged_model & model);
    ggml_status        fill(paged_model & model, const std::vector<fill_job> & jobs) {
        return filler_.fill(model.store, model.way, model.stats, jobs);
    }

    ggml_backend_t       inner_;
    slot_filler          filler_;
    prefetcher           prefetcher_;
    wave_runner          waves_;
    device_lookups       device_;
    state                now_;
    std::vector<int32_t> ids_; // [n_expert_used * n_tokens] of the current lookup, k fastest
    std::vector<char>    raw_ids_;
};

} // namespace rotary
