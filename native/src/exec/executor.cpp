// SPDX-License-Identifier: MIT
//
// Executor. See executor.hpp.

#include "exec/executor.hpp"

#include "base/error.hpp"
#include "base/forked_compute.hpp"
#include "base/inner_device.hpp"

#include "ggml-impl.h"

namespace rotary {

executor::~executor() {
    if (can_compute_here()) {
        ggml_backend_synchronize(inner_);
    }
    for (const std::weak_ptr<pool> & each : pools_) {
        if (const std::shared_ptr<pool> alive = each.lock()) {
            alive->remove_user(inner_);
        }
    }
}

// A forked child inherits GPU handles that it cannot use.
bool executor::can_compute_here() const {
    return made_in_ == fork_generation() || inner_is_cpu(ggml_backend_get_device(inner_));
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
        if (begin_computation(inner_)) {
            return compute_paged(graph);
        }
        return on_new_thread([&] { return guarded(GGML_STATUS_ALLOC_FAILED, [&] { return compute_paged(graph); }); });
    });
}

ggml_status executor::compute_paged(ggml_cgraph * graph) {
    // A graph uses one pool; a second one belongs to an adapter loaded while another model's pool was collecting.
    std::shared_ptr<rotary::pool> pool;
    for (int i = 0; i < graph->n_nodes; i++) {
        if (graph->nodes[i]->op != GGML_OP_MUL_MAT_ID) {
            continue;
        }
        const std::shared_ptr<rotary::pool> other = find_(graph->nodes[i]->src[0]);
        if (other && pool && other != pool) {
            fail(ROTARY_ERR_STATE, format("%s: belongs to another pool than this model's other experts; load adapters "
                                          "before the next model",
                                          graph->nodes[i]->src[0]->name));
            return GGML_STATUS_FAILED;
        }
        pool = other ? other : pool;
    }
    if (!pool) {
        return ggml_backend_graph_compute_async(inner_, graph);
    }

    const pool_lock::hold held(pool->lock);
    if (pool->prepare() != ROTARY_OK) {
        return GGML_STATUS_FAILED;
    }
    if (pool->model.transfer.over() != nullptr && !lookup_.make_events()) {
        return GGML_STATUS_FAILED;
    }
    pools_.reserve(pools_.size() + 1);
    if (pool->add_user(inner_)) {
        pools_.push_back(pool);
    }
    const ggml_status status = guarded(GGML_STATUS_ALLOC_FAILED, [&] { return run_over(*pool, graph); });
    if (status != GGML_STATUS_SUCCESS) {
        pool->forget_slots();
    }
    pool->model.store.count_reads();
    pool->model.store.announce_io();
    segments_.restore();
    lookup_.forget();
    if (pool->is_shared()) {
        ggml_backend_synchronize(inner_); // the next backend may overwrite slots that this graph still reads
    }
    return status;
}

ggml_status executor::run_over(pool & pool, ggml_cgraph * graph) {
    if (!pool.begin_graph(inner_)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    segments_.begin_graph(pool.model.generation());
    lookup_.begin_graph();
    ggml_status status = pool.model.store.files_unchanged() ? run_nodes(pool, graph) : GGML_STATUS_FAILED;
    if (status == GGML_STATUS_SUCCESS) {
        status = lookup_.finish(pool);
    }
    if (status == GGML_STATUS_SUCCESS && (!lookup_.end_graph(pool) || !pool.model.store.files_unchanged())) {
        status = GGML_STATUS_FAILED; // a lookup was refused, or a file has been replaced during the graph
    }
    return status;
}

ggml_status executor::run_nodes(rotary::pool & pool, ggml_cgraph * graph) {
    int i0 = 0;
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        if (node->op == GGML_OP_MUL_MAT_ID && find_(node->src[0]).get() == &pool && !ggml_is_empty(node)) {
            const ggml_status status = run_paged_node(pool, graph, i, i0);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
    }
    return segments_.run(graph, i0, graph->n_nodes);
}

// Resolve node i's lookup unless it is current, then point it at slots or run it in passes. Nodes before i0 have run.
ggml_status executor::run_paged_node(rotary::pool & pool, ggml_cgraph * graph, int i, int & i0) {
    ggml_tensor * node         = graph->nodes[i];
    const auto [layer, tensor] = pool.model.experts.find(node->src[0]);
    if (layer == nullptr) {
        fail(ROTARY_ERR_STATE, format("%s: a view of shape [%lld, %lld, %lld] of paged experts; only whole expert "
                                      "matrices can be paged; turn paging off for this model",
                                      node->src[0]->name, (long long) node->src[0]->ne[0],
                                      (long long) node->src[0]->ne[1], (long long) node->src[0]->ne[2]));
        return GGML_STATUS_FAILED;
    }
    const auto run_before = [&, i] { // nodes [i0, i)
        const ggml_status status = segments_.run(graph, i0, i);
        i0                       = i;
        return status;
    };
    ggml_status status = GGML_STATUS_SUCCESS;
    // Waves overwrite slots, so a tensor that is used again after its waves needs a new lookup.
    if (!lookup_.matches(*layer, node->src[2]) ||
        (lookup_.current_mode() == lookup::mode::waves && lookup_.is_done(*tensor))) {
        if (layer->path == ROTARY_PATH_SLOTS || pool.model.trace.on()) {
            status = run_before();
        }
        if (status == GGML_STATUS_SUCCESS) {
            status = lookup_.finish(pool);
        }
        if (status == GGML_STATUS_SUCCESS) {
            status = lookup_.resolve(pool, *layer, graph, i);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    switch (lookup_.current_mode()) {
        case lookup::mode::mapped: break;
        case lookup::mode::resident: segments_.patch(node, tensor->slots, node->src[2]); break; // expert e is in slot e
        case lookup::mode::on_device:
            segments_.patch(node, tensor->slots, pool.model.lookup_memory.slot_ids(layer->index));
            break;
        case lookup::mode::slots:
            if (!lookup_.is_done(*tensor)) { // still being read: compute the nodes before it meanwhile
                status = run_before();
                if (status == GGML_STATUS_SUCCESS && lookup_.worth_splitting(pool.model, node)) {
                    i0 = i + 1;
                    return lookup_.run_hits_first(pool.model, node, *tensor);
                }
                if (status == GGML_STATUS_SUCCESS) {
                    status = lookup_.fill(pool.model, *tensor);
                }
            }
            segments_.patch(node, tensor->slots, pool.model.lookup_memory.slot_ids(layer->index));
            break;
        case lookup::mode::waves:
            status = run_before();
            i0     = i + 1;
            return status == GGML_STATUS_SUCCESS ? lookup_.run_waves(pool.model, node, *tensor) : status;
    }
    return status;
}

} // namespace rotary
