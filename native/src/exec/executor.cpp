// SPDX-License-Identifier: MIT
//
// Executor. See executor.hpp.
//
// A graph runs in segments. A segment ends before a MUL_MAT_ID whose routing is not known yet: the ids it has computed
// are read back, the experts they name are paged in, and the node is pointed at the layer's slots (its weight) and at
// the same ids rewritten to slots. gate, up and down share one ids tensor, so this happens once a layer, and what
// follows up to the next layer's lookup is one segment again, in which the inner backend can fuse and capture.
//
// With the direct store, the reads of all absent experts start at the lookup, then those that the next layers will
// probably want; each tensor is filled just before its own node, so what precedes it is computed meanwhile.
//
// A batch that wants more distinct experts than there are slots runs either straight from host memory (host inner
// device, plain layout, experts mapped) or in waves, see waves.cpp.

#include "exec/executor.hpp"

#include "base/error.hpp"
#include "ggml/device.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

executor::executor(ggml_backend_t inner) : inner_(inner), filler_(inner), products_(inner) {}

// All that work with a link needs; those that could not be had are tried again with the next graph.
bool executor::make_events() {
    bool all = filler_.make_event();
    for (ggml_backend_event_ptr * each : { &computed_, &paged_, &counted_, &wave_[0], &wave_[1] }) {
        if (!*each) {
            each->reset(ggml_backend_event_new(ggml_backend_get_device(inner_)));
        }
        all = all && *each;
    }
    if (!all) {
        fail(ROTARY_ERR_DEVICE,
             format("%s: no event is left, by which copies of experts are ordered; close other models "
                    "on it",
                    ggml_backend_name(inner_)));
    }
    return all;
}

executor::~executor() {
    if (can_compute_here()) {
        ggml_backend_synchronize(inner_);
    }
    for (const std::weak_ptr<pool> & each : pools_) {
        if (const std::shared_ptr<pool> alive = each.lock()) {
            alive->forget(inner_);
        }
    }
}

// ---- graph

// A forked child has its parent's handles of a GPU, and no way to it.
bool executor::can_compute_here() const {
    return made_in_ == fork_generation() ||
           ggml_backend_dev_type(ggml_backend_get_device(inner_)) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

ggml_status executor::compute(ggml_cgraph * graph) {
    return guarded(GGML_STATUS_ALLOC_FAILED, [&] {
        if (!can_compute_here()) {
            fail(ROTARY_ERR_STATE,
                 format("%s: this process was forked after the model was loaded, so it cannot be used here; load the "
                        "model in this process",
                        ggml_backend_name(inner_)));
            return GGML_STATUS_FAILED;
        }
        if (!lost_threads(inner_)) {
            return compute_paged(graph);
        }
        return on_new_thread([&] { return guarded(GGML_STATUS_ALLOC_FAILED, [&] { return compute_paged(graph); }); });
    });
}

ggml_status executor::compute_paged(ggml_cgraph * graph) {
    // One pool a graph: a second one is an adapter that was loaded while another model's pool was collecting.
    std::shared_ptr<rotary::pool> pool;
    for (int i = 0; i < graph->n_nodes; i++) {
        if (graph->nodes[i]->op != GGML_OP_MUL_MAT_ID) {
            continue;
        }
        const std::shared_ptr<rotary::pool> its = paged_pool_of(graph->nodes[i]->src[0]);
        if (its && pool && its != pool) {
            fail(ROTARY_ERR_STATE, format("%s: belongs to another pool than this model's other experts; load adapters "
                                          "before the next model",
                                          graph->nodes[i]->src[0]->name));
            return GGML_STATUS_FAILED;
        }
        pool = its ? its : pool;
    }
    if (!pool) {
        return ggml_backend_graph_compute_async(inner_, graph);
    }

    const pool::hold lock(*pool);
    if (pool->prepare() != ROTARY_OK) {
        return GGML_STATUS_FAILED;
    }
    if (pool->side() != nullptr && !make_events()) {
        return GGML_STATUS_FAILED;
    }
    pools_.reserve(pools_.size() + 1);
    if (pool->use_from(inner_)) {
        pools_.push_back(pool);
    }
    const ggml_status status = guarded(GGML_STATUS_ALLOC_FAILED, [&] { return run_over(*pool, graph); });
    resolved_on_device_      = false;
    if (status != GGML_STATUS_SUCCESS) {
        pool->forget_slots();
    }
    pool->count_reads();
    pool->announce_io();
    restore();
    lookup_ = {};
    if (pool->is_shared()) {
        ggml_backend_synchronize(inner_); // the next backend may overwrite slots that this graph still reads
    }
    return status;
}

// The graph, and what is to be done between two graphs.
ggml_status executor::run_over(pool & pool, ggml_cgraph * graph) {
    if (pool.is_spoiled() && !pool.forget_slots()) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    if (segments_generation_ != pool.generation() || segments_.size() > 1024) {
        segments_.clear();
        segments_generation_ = pool.generation();
    }

    pool.count_reads(); // a reset of the counters is for what comes now
    pool.follow_memory();
    pool.move_a_slot(inner_);
    pool.forget_guesses(); // at lookups that never came
    looked_up_us_ = 0;     // what is between two graphs is no layer's time

    ggml_status status = pool.files_unchanged() ? run_nodes(pool, graph) : GGML_STATUS_FAILED;
    if (status == GGML_STATUS_SUCCESS) {
        status = finish_lookup(pool);
    }
    if (status == GGML_STATUS_SUCCESS && resolved_on_device_ && !finish_on_device(pool)) {
        status = GGML_STATUS_FAILED;
    }
    if (status == GGML_STATUS_SUCCESS && !pool.files_unchanged()) {
        status = GGML_STATUS_FAILED; // what has been read may belong to another model
    }
    return status;
}

ggml_status executor::run_nodes(rotary::pool & pool, ggml_cgraph * graph) {
    int i0 = 0; // the first node that has not run
    for (int i = 0; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (node->op != GGML_OP_MUL_MAT_ID || paged_pool_of(node->src[0]).get() != &pool || ggml_is_empty(node)) {
            continue;
        }
        const auto [layer, tensor] = pool.find(node->src[0]);
        if (layer == nullptr) {
            fail(ROTARY_ERR_STATE, format("%s: a view of shape [%lld, %lld, %lld] of paged experts; only whole expert "
                                          "matrices can be paged; turn paging off for this model",
                                          node->src[0]->name, (long long) node->src[0]->ne[0],
                                          (long long) node->src[0]->ne[1], (long long) node->src[0]->ne[2]));
            return GGML_STATUS_FAILED;
        }
        const bool same = lookup_.layer == layer && lookup_.ids == node->src[2];
        // A tensor that has been through this lookup's waves and is wanted again has to begin anew.
        if (!same || (lookup_.how == mode::waves && is_done(*tensor))) {
            ggml_status status = GGML_STATUS_SUCCESS;
            if (layer->path == ROTARY_PATH_SLOTS || pool.tracing()) {
                status = run_segment(graph, i0, i);
                i0     = i;
            }
            if (status == GGML_STATUS_SUCCESS) {
                status = finish_lookup(pool);
            }
            if (status == GGML_STATUS_SUCCESS) {
                status = look_up(pool, *layer, graph, i);
            }
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
        switch (lookup_.how) {
            case mode::direct: break;
            case mode::on_device: patch(node, tensor->slots, layer->slot_ids); break;
            case mode::resident:
                patch(node, tensor->slots, node->src[2]); // expert e is in slot e
                break;
            case mode::slots:
                if (!is_done(*tensor)) { // still being read: compute what comes before it
                    ggml_status status = run_segment(graph, i0, i);
                    i0                 = i;
                    if (status == GGML_STATUS_SUCCESS && worth_splitting(pool, node)) {
                        split_rows(*layer);
                        status = run_waves(pool, node, *tensor);
                        i0     = i + 1;
                    } else if (status == GGML_STATUS_SUCCESS) {
                        status = fill(pool, *tensor);
                    }
                    if (status != GGML_STATUS_SUCCESS) {
                        return status;
                    }
                }
                if (i0 <= i) {
                    patch(node, tensor->slots, layer->slot_ids);
                }
                break;
            case mode::waves:
                ggml_status status = run_segment(graph, i0, i);
                i0                 = i + 1;
                if (status == GGML_STATUS_SUCCESS) {
                    status = run_waves(pool, node, *tensor);
                }
                if (status != GGML_STATUS_SUCCESS) {
                    return status;
                }
        }
    }
    return run_segment(graph, i0, graph->n_nodes);
}

void executor::patch(ggml_tensor * node, ggml_tensor * weight, ggml_tensor * ids) {
    patched_.push_back({ node, node->src[0], node->src[2] });
    node->src[0] = weight;
    node->src[2] = ids;
}

ggml_status executor::run_segment(ggml_cgraph * graph, int i0, int i1) {
    ggml_status status = GGML_STATUS_SUCCESS;
    if (i0 < i1) {
        ggml_cgraph view = ggml_graph_view(graph, i0, i1);
        if (patched_.empty() && i1 - i0 == graph->n_nodes) {
            view.uid = graph->uid;
        } else if (graph->uid != 0) {
            auto it = std::find_if(segments_.begin(), segments_.end(), [&](const segment & s) {
                return s.graph == graph->uid && s.i0 == i0 && s.i1 == i1;
            });
            if (it == segments_.end()) {
                it = segments_.insert(it, { graph->uid, i0, i1, ggml_graph_next_uid() });
            }
            view.uid = it->uid;
        }
        status = ggml_backend_graph_compute_async(inner_, &view);
    }
    restore();
    return status;
}

// The graph belongs to llama.cpp, which may build on it; the inner backend has taken what it needs.
void executor::restore() {
    for (const patched & each : patched_) {
        each.node->src[0] = each.weight;
        each.node->src[2] = each.ids;
    }
    patched_.clear();
}

// ---- reading ahead

// Ask the store for what this lookup wants, then for what the next layers will probably want.
void executor::ask_store(pool & pool, paged_layer & layer, const std::vector<int32_t> & experts,
                         const ggml_tensor * node) {
    direct_store * store = pool.direct();
    if (store == nullptr) {
        return;
    }
    look_back(pool, layer, experts);
    rotary_stats delta  = {};
    const auto   demand = [&](const paged_tensor & tensor, int32_t expert, char * place) {
        const direct_store::found found = store->demand(tensor, expert, place);
        if (&tensor == lookup_.leader() && found != direct_store::found::absent) {
            delta.prefetch_used++;
            const bool all = std::all_of(lookup_.order.begin(), lookup_.order.end(), [&](const auto * each) {
                return !each->direct || store->landed(*each, expert);
            });
            delta.late_hits += !all;
        }
    };
    const std::vector<int32_t> slots = pool.landing_slots(layer, lookup_.loads);
    for (const paged_tensor * tensor : lookup_.order) {
        if (!tensor->direct) {
            continue;
        }
        for (size_t i = 0; i < lookup_.loads.size(); i++) {
            if (slots[i] != pool::in_ram) {
                demand(*tensor, lookup_.loads[i].expert, slots[i] >= 0 ? tensor->landing_at(slots[i]) : nullptr);
            }
        }
        for (const wave & each : lookup_.waves) {
            for (const rotary_load & load : each.loads) {
                if (!pool.fetchable(*tensor, load.expert) || store->knows(*tensor, load.expert)) {
                    demand(*tensor, load.expert, nullptr);
                }
            }
        }
    }
    for (const paged_tensor * tensor : layer.tensors) {
        store->cancel(*tensor); // foretold, and not wanted
    }
    pool.settle(layer, false);
    store->pump();
    if (pool.config.prefetch) {
        foretell(pool, layer, node);
        store->pump();
    }
    pool.count_prefetch(delta);
    pool.count_reads();
}

// ---- filling

bool executor::is_done(const paged_tensor & tensor) const {
    return std::find(lookup_.done.begin(), lookup_.done.end(), &tensor) != lookup_.done.end();
}

// Fill all tensors whose experts have landed, in one go.
ggml_status executor::fill_landed(pool & pool) {
    std::vector<fill_job> jobs;
    for (const paged_tensor * tensor : lookup_.order) {
        const bool all = std::all_of(lookup_.loads.begin(), lookup_.loads.end(),
                                     [&](const rotary_load & load) { return pool.fetchable(*tensor, load.expert); });
        if (all) {
            for (const rotary_load & load : lookup_.loads) {
                jobs.push_back({ tensor, load.expert, load.slot });
            }
            lookup_.done.push_back(tensor);
        }
    }
    return filler_.fill(pool, jobs);
}

ggml_status executor::fill(pool & pool, const paged_tensor & tensor) {
    std::vector<fill_job> jobs;
    for (const rotary_load & load : lookup_.loads) {
        jobs.push_back({ &tensor, load.expert, load.slot });
    }
    lookup_.done.push_back(&tensor);
    return filler_.fill(pool, jobs);
}

// The slot table already tells the state after the lookup; a tensor that this graph did not touch must get there too.
ggml_status executor::finish_lookup(pool & pool) {
    std::vector<fill_job> jobs;
    if (lookup_.layer != nullptr && (lookup_.how == mode::waves || lookup_.how == mode::slots)) {
        for (const paged_tensor * tensor : lookup_.layer->tensors) {
            for (int32_t slot = 0; !is_done(*tensor) && slot < lookup_.layer->table->n_slots(); slot++) {
                const int32_t expert = lookup_.layer->table->expert_of(slot);
                const auto    loaded = [&](const rotary_load & load) {
                    return load.expert == expert;
                };
                if (expert >= 0 &&
                    (lookup_.how == mode::waves || std::any_of(lookup_.loads.begin(), lookup_.loads.end(), loaded))) {
                    jobs.push_back({ tensor, expert, slot });
                }
            }
        }
    }
    lookup_ = {};
    return filler_.fill(pool, jobs);
}

} // namespace rotary
