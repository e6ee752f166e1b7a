// SPDX-License-Identifier: MIT
//
// Executor: one lookup, by the host or by the device. See executor.hpp.

#include "base/clock.hpp"
#include "base/error.hpp"
#include "exec/executor.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace rotary {

// ids may be a view with strides: the first n_expert_used columns of a sorted [n_expert, n_tokens].
void executor::read_ids(pool & pool, const ggml_tensor * ids) {
    const auto start = std::chrono::steady_clock::now();
    ggml_backend_synchronize(inner_);
    in_flight_.clear();
    ids_raw_.resize(ggml_nbytes(ids));
    ggml_backend_tensor_get(ids, ids_raw_.data(), 0, ids_raw_.size());
    const auto waited = std::chrono::steady_clock::now() - start;
    pool.count_wait(std::chrono::duration_cast<std::chrono::microseconds>(waited).count());

    ids_.resize(ggml_nelements(ids));
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (int64_t k = 0; k < ids->ne[0]; k++) {
            memcpy(&ids_[t * ids->ne[0] + k], &ids_raw_[t * ids->nb[1] + k * ids->nb[0]], sizeof(int32_t));
        }
    }
}

// The router's weights of the ids of node i, as ids_; empty where they are not to be had: a GPU may compute them together
// with something else, and not keep them; some models choose by what becomes a weight later.
std::vector<float> executor::read_weights(const pool & pool, const ggml_cgraph * graph, int i) const {
    const ggml_tensor * ids = graph->nodes[i]->src[2];
    for (int j = i - 1; pool.inner_is_host() && j >= 0; j--) {
        const ggml_tensor * node = graph->nodes[j];
        if (node->op == GGML_OP_GET_ROWS && node->src[1] == ids && node->ne[0] == 1 && node->type == GGML_TYPE_F32 &&
            ggml_nelements(node) == ggml_nelements(ids) && ggml_is_contiguous(node)) {
            std::vector<float> weights(ggml_nelements(node));
            ggml_backend_tensor_get(node, weights.data(), 0, ggml_nbytes(node));
            const bool are = std::all_of(weights.begin(), weights.end(),
                                         [](float weight) { return weight >= 0 && std::isfinite(weight); });
            return are ? weights : std::vector<float>();
        }
    }
    return {};
}

// The tensors that share a lookup, in the order in which the graph from node i on uses them, then those it does not use.
std::vector<paged_tensor *> executor::order_of_use(const pool & pool, paged_layer & layer, const ggml_cgraph * graph,
                                                   int i) {
    std::vector<paged_tensor *> order;
    const auto                  add = [&](paged_tensor * tensor) {
        if (std::find(order.begin(), order.end(), tensor) == order.end()) {
            order.push_back(tensor);
        }
    };
    const ggml_tensor * ids = graph->nodes[i]->src[2];
    for (; i < graph->n_nodes && order.size() < layer.tensors.size(); i++) {
        const ggml_tensor * node = graph->nodes[i];
        if (node->op == GGML_OP_MUL_MAT_ID && node->src[2] == ids) {
            const auto [its, tensor] = pool.find(node->src[0]);
            if (its == &layer) {
                add(tensor);
            }
        }
    }
    std::for_each(layer.tensors.begin(), layer.tensors.end(), add);
    return order;
}

ggml_status executor::look_up(pool & pool, paged_layer & layer, const ggml_cgraph * graph, int i) {
    const ggml_tensor * ids = graph->nodes[i]->src[2];
    lookup_                 = {};
    lookup_.layer           = &layer;
    lookup_.ids             = ids;

    rotary_layer_stats delta = {};
    delta.lookups            = 1;
    delta.requests           = ggml_nelements(ids);
    if (layer.path != ROTARY_PATH_SLOTS) {
        if (pool.tracing()) {
            read_ids(pool, ids);
            pool.record(layer, ids_, read_weights(pool, graph, i), ids->ne[0]);
        }
        // Every expert is there: nobody needs to know which ones are wanted.
        lookup_.how = layer.path == ROTARY_PATH_MAPPED ? mode::direct : mode::resident;
        delta.hits  = delta.requests;
        pool.count(layer, delta);
        return GGML_STATUS_SUCCESS;
    }
    if (!pool.tracing() && pool.resolves_on_device(layer, ggml_nelements(ids))) {
        return look_up_on_device(pool, layer, graph->nodes[i]);
    }
    if (!pool.table_to_host(layer)) {
        return GGML_STATUS_FAILED;
    }
    read_ids(pool, ids);
    count_layer(pool, ids->ne[1]);
    lookup_.order = order_of_use(pool, layer, graph, i);

    // Distinct experts, those that are resident first: a wave then begins with what needs no copy. The others as they
    // lie in the file.
    std::vector<int32_t> experts;
    std::vector<bool>    seen(layer.n_expert, false);
    for (const int32_t expert : ids_) {
        if (expert < 0 || expert >= layer.n_expert) {
            fail(ROTARY_ERR_ARG, format("%s: layer %d routed to expert %d of %d; the graph is broken",
                                        pool.config.model.c_str(), layer.il, expert, layer.n_expert));
            return GGML_STATUS_FAILED;
        }
        if (!seen[expert]) {
            seen[expert] = true;
            experts.push_back(expert);
        }
    }
    const std::vector<float> weights =
        pool.tracing() || layer.table->wants_weights() ? read_weights(pool, graph, i) : std::vector<float>();
    if (pool.tracing()) {
        pool.record(layer, ids_, weights, ids->ne[0]);
    }
    const int32_t n_slots = layer.table->n_slots();
    if (direct_store * store = pool.direct()) {
        store->cancel_queued();
        store->notice();
        if (experts.size() + layer.table->reserved().size() > (size_t) n_slots) {
            pool.settle(layer, true); // what has come too early must not be in the way
        }
    }
    const auto absent = std::stable_partition(experts.begin(), experts.end(),
                                              [&](int32_t expert) { return layer.table->slot_of(expert) >= 0; });
    std::sort(absent, experts.end());

    layer.table->note(ids_.data(), weights.empty() ? nullptr : weights.data(), (int32_t) ids->ne[0],
                      (int32_t) ids->ne[1]);

    pool.note_use(layer, ids_, ids->ne[0]);

    delta.misses = experts.end() - absent;
    delta.hits   = delta.requests - delta.misses;
    if ((int32_t) experts.size() <= n_slots) {
        lookup_.how            = mode::slots;
        ggml_tensor * slot_ids = pool.slot_ids(layer, ids->ne[0], ids->ne[1]);
        if (slot_ids == nullptr) {
            fail(ROTARY_ERR_MEMORY, format("%s: no memory for %zu ids on the inner device; lower n_ubatch",
                                           pool.config.model.c_str(), ids_.size()));
            return GGML_STATUS_ALLOC_FAILED;
        }
        lookup_.loads.resize(n_slots);
        layer.slot_ids_host.resize(ids_.size());
        lookup_.loads.resize(
            layer.table->place(ids_.data(), (int32_t) ids_.size(), layer.slot_ids_host.data(), lookup_.loads.data()));
        std::sort(lookup_.loads.begin(), lookup_.loads.end(),
                  [](const rotary_load & a, const rotary_load & b) { return a.expert < b.expert; });
        lookup_.n_hits = absent - experts.begin();
        for (const rotary_load & load : lookup_.loads) {
            delta.evictions += load.evicted >= 0;
        }
        delta.bytes_paged = lookup_.loads.size() * layer.expert_bytes;
        ggml_backend_tensor_set_async(inner_, slot_ids, layer.slot_ids_host.data(), 0, ggml_nbytes(slot_ids));
    } else if (layer.host_plain && pool.config.direct) {
        lookup_.how    = mode::direct;
        delta.bypassed = delta.misses;
    } else {
        lookup_.how = mode::waves;
        plan_waves(pool, layer, experts, absent - experts.begin());
        for (const wave & each : lookup_.waves) {
            delta.bytes_paged += each.loads.size() * layer.expert_bytes;
            for (const rotary_load & load : each.loads) {
                delta.evictions += load.evicted >= 0;
            }
        }
        delta.waves = lookup_.waves.size() - 1;
    }
    pool.count(layer, delta);
    ask_store(pool, layer, experts, graph->nodes[i]);
    const ggml_status status = lookup_.how == mode::slots ? fill_landed(pool) : GGML_STATUS_SUCCESS;
    looked_up_us_            = now_us();
    return status;
}

// All of it is enqueued: the host learns neither the routing nor what was absent.
ggml_status executor::look_up_on_device(pool & pool, paged_layer & layer, const ggml_tensor * node) {
    const ggml_tensor * ids      = node->src[2];
    ggml_tensor *       slot_ids = pool.slot_ids(layer, ids->ne[0], ids->ne[1]);
    if (slot_ids == nullptr) {
        fail(ROTARY_ERR_MEMORY, format("%s: no memory for %lld ids on the inner device; lower n_ubatch",
                                       pool.config.model.c_str(), (long long) ggml_nelements(ids)));
        return GGML_STATUS_ALLOC_FAILED;
    }
    pool.table_to_device(layer);
    rotary_link_lookup & its = layer.resolved;
    its.ids      = { (const char *) ids->data, (int32_t) ids->ne[0], (int32_t) ids->ne[1], (int64_t) ids->nb[0],
                     (int64_t) ids->nb[1] };
    its.slot_ids = (int32_t *) slot_ids->data;
    its.number++;
    lookup_.how         = mode::on_device;
    resolved_on_device_ = true;

    rotary_link_foretelling next;
    const bool              ahead = pool.config.prefetch && foretell_on_device(pool, layer, node, next);

    ggml_backend_event_record(computed_.get(), inner_);
    link & side = *pool.side();
    if (!side.wait(computed_.get()) || !side.look_up(its, ahead ? &next : nullptr) || !side.record(paged_.get())) {
        return GGML_STATUS_FAILED;
    }
    its.foretold = false;
    if (ahead) {
        layer.next->resolved.foretold = true;
    }
    ggml_backend_event_wait(inner_, paged_.get());
    return GGML_STATUS_SUCCESS;
}

// Wait until the link has come through this graph's last lookup, not for what is computed after it: a refusal has to fail
// this graph, whose output is wrong, and figures are complete when it returns.
bool executor::finish_on_device(pool & pool) {
    if (!pool.send_states() || !pool.side()->record(counted_.get())) {
        return false;
    }
    ggml_backend_event_synchronize(counted_.get());
    return pool.take_states();
}

} // namespace rotary
