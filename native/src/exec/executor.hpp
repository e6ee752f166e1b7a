// SPDX-License-Identifier: MIT
//
// Executor: runs a compute graph on the inner backend, stopping at each expert lookup to page in what it wants.

#pragma once

#include "base/fork.hpp"
#include "base/forked_compute.hpp"
#include "link/slot_filler.hpp"
#include "pool/pool.hpp"
#include "prefetch/gain.hpp"
#include "prefetch/router.hpp"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace rotary {

class executor {
  public:
    explicit executor(ggml_backend_t inner);
    ~executor();

    ggml_status compute(ggml_cgraph * graph);

  private:
    bool can_compute_here() const; // in this process
    // direct: from host memory as it is; resident: every expert in its slot; slots: with rewritten ids; waves: in passes
    // on_device: in the slots that the inner device has resolved itself
    enum class mode { direct, resident, slots, waves, on_device };

    // What one wave pages in and which (expert-used, token) rows of the lookup it computes.
    struct wave {
        size_t                   n_experts = 0;
        std::vector<rotary_load> loads;
        std::vector<int32_t>     rows;  // k + t * n_expert_used
        std::vector<int32_t>     slots; // the slot of each row's expert
    };

    // Of a wave's rows: where their input is, their experts' slots, where their output goes.
    struct wave_rows {
        std::vector<int32_t> from, slots, to;
    };

    // The current lookup of a layer: its routing, resolved once for all tensors that share it.
    struct lookup {
        paged_layer *                     layer = nullptr;
        const ggml_tensor *               ids   = nullptr;
        mode                              how   = mode::direct;
        std::vector<paged_tensor *>       order;      // the layer's tensors as the graph uses them
        std::vector<rotary_load>          loads;      // mode slots: what is absent
        size_t                            n_hits = 0; // mode slots: experts that are there
        std::vector<wave>                 waves;
        std::vector<const paged_tensor *> done; // tensors whose slots are filled, or that have been through the waves

        // Stands for the expert where reads of experts are counted; NULL if none is read.
        const paged_tensor * leader() const {
            const auto its = std::find_if(order.begin(), order.end(), [](const auto * each) { return each->direct; });
            return its != order.end() ? *its : nullptr;
        }
    };

    bool        make_events();
    ggml_status compute_paged(ggml_cgraph * graph);
    ggml_status run_over(pool & pool, ggml_cgraph * graph);
    ggml_status run_nodes(pool & pool, ggml_cgraph * graph);
    ggml_status run_segment(ggml_cgraph * graph, int i0, int i1);
    ggml_status look_up(pool & pool, paged_layer & layer, const ggml_cgraph * graph, int i);
    ggml_status look_up_on_device(pool & pool, paged_layer & layer, const ggml_tensor * node);
    ggml_status finish_lookup(pool & pool);
    bool        finish_on_device(pool & pool);

    static std::vector<paged_tensor *> order_of_use(const pool & pool, paged_layer & layer, const ggml_cgraph * graph,
                                                    int i);

    // filling slots
    bool        is_done(const paged_tensor & tensor) const;
    ggml_status fill_landed(pool & pool);
    ggml_status fill(pool & pool, const paged_tensor & tensor);

    // reading ahead; what is foretold is in foresight.cpp
    void ask_store(pool & pool, paged_layer & layer, const std::vector<int32_t> & experts, const ggml_tensor * node);
    void foretell(pool & pool, paged_layer & layer, const ggml_tensor * node);
    void guess_at(paged_layer & layer, int distance, const std::vector<int32_t> & chosen,
                  std::vector<int32_t> & experts) const;
    std::vector<const float *> apply_routers(const paged_layer & layer, const std::vector<paged_layer *> & layers,
                                             const ggml_tensor * input, int64_t n_tokens);
    void                       count_layer(pool & pool, int64_t n_tokens);
    void                       look_back(pool & pool, paged_layer & layer, const std::vector<int32_t> & experts);
    bool foretell_on_device(pool & pool, paged_layer & layer, const ggml_tensor * node, rotary_link_foretelling & its);

    // passes: waves.cpp
    void        plan_waves(const pool & pool, paged_layer & layer, const std::vector<int32_t> & order, size_t n_hits);
    ggml_status run_waves(pool & pool, ggml_tensor * node, paged_tensor & tensor);
    ggml_status run_wave(pool & pool, ggml_tensor * node, paged_tensor & tensor, const wave & its);
    bool        wait_for_slots(pool & pool, size_t index);
    bool        worth_splitting(const pool & pool, const ggml_tensor * node) const;
    void        split_rows(const paged_layer & layer);

    void read_ids(pool & pool, const ggml_tensor * ids);

    std::vector<float> read_weights(const pool & pool, const ggml_cgraph * graph, int i) const;
    void               patch(ggml_tensor * node, ggml_tensor * weight, ggml_tensor * ids);
    void               restore();

    struct patched {
        ggml_tensor * node;
        ggml_tensor * weight;
        ggml_tensor * ids;
    };
    struct segment {
        uint64_t graph; // uid
        int      i0;
        int      i1;
        uint64_t uid;
    };

    ggml_backend_t                   inner_;
    const uint32_t                   made_in_ = fork_generation();
    ggml_backend_event_ptr           computed_; // the inner backend has come so far
    ggml_backend_event_ptr           paged_;    // the link has come so far
    ggml_backend_event_ptr           counted_;  // what the device has counted is with the host
    ggml_backend_event_ptr           wave_[2];  // the inner backend has come so far, after every other wave
    bool                             resolved_on_device_ = false; // some lookup of this graph
    slot_filler                      filler_;
    router_products                  products_;
    experience                       experience_;
    uint64_t                         looked_up_us_ = 0; // when the last lookup was done
    uint64_t                         stalled_us_   = 0; // by the disk, until then
    std::vector<std::weak_ptr<pool>> pools_;            // that this backend has run over

    lookup                lookup_;
    std::vector<int32_t>  ids_;       // [n_expert_used * n_tokens] of the current lookup, k fastest
    std::vector<char>     ids_raw_;
    std::deque<wave_rows> in_flight_; // of waves that the inner backend may not have taken yet
    std::vector<patched>  patched_;

    // Segments keep their uid while llama.cpp runs the same graph again, so that captured graphs stay valid.
    std::vector<segment> segments_;
    uint64_t             segments_generation_ = 0;
};

} // namespace rotary
