// SPDX-License-Identifier: MIT
//
// Executor. See executor.hpp.
//
// A graph runs in segments. A segment ends before a MUL_MAT_ID whose routing is not known yet: the ids it has computed
// are read back, the experts they name are paged in, and the node is pointed at the layer's slots (its weight) and at
// the same ids rewritten to slots. gate, up and down share one ids tensor, so this happens once a layer, and what
// follows up to the next layer's lookup is one segment again, in which the inner backend can fuse and capture.
//
// A batch that wants more distinct experts than there are slots runs either straight from host memory (host inner
// device, plain layout) or in waves: each wave pages in as many experts as there are slots and multiplies the rows
// routed to them, gathered into a small graph of its own. An expert's rows are always all in one wave, and a row's
// result does not depend on the others, so the output is the same bit for bit where the kernel is the same.

#include "executor.hpp"

#include "device.hpp"
#include "error.hpp"

#include "ggml-alloc.h"
#include "ggml-impl.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace rotary {

executor::~executor() {
    for (const std::weak_ptr<pool> & each : pools_) {
        if (const std::shared_ptr<pool> alive = each.lock()) {
            alive->forget(inner_);
        }
    }
}

// ---- graph

ggml_status executor::compute(ggml_cgraph * graph) {
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

    const std::lock_guard<std::mutex> lock(pool->mutex);
    if (pool->prepare() != ROTARY_OK) {
        return GGML_STATUS_FAILED;
    }
    if (pool->use_from(inner_)) {
        pools_.push_back(pool);
    }
    if (segments_generation_ != pool->generation() || segments_.size() > 1024) {
        segments_.clear();
        segments_generation_ = pool->generation();
    }

    const ggml_status status = run_nodes(*pool, graph);
    if (status == GGML_STATUS_SUCCESS) {
        finish_lookup(*pool);
    } else if (lookup_.layer != nullptr && lookup_.layer->table) {
        lookup_.layer->table->clear(); // stopped part-way: the slots may not hold what the table says
    }
    restore();
    lookup_ = {};
    if (pool->is_shared()) {
        ggml_backend_synchronize(inner_); // the next backend may overwrite slots that this graph still reads
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
        if (!same || std::find(lookup_.done.begin(), lookup_.done.end(), tensor) != lookup_.done.end()) {
            ggml_status status = GGML_STATUS_SUCCESS;
            if (layer->path == ROTARY_PATH_SLOTS) {
                status = run_segment(graph, i0, i);
                i0     = i;
            }
            if (status == GGML_STATUS_SUCCESS) {
                finish_lookup(pool);
                status = look_up(pool, *layer, node->src[2]);
            }
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
        switch (lookup_.how) {
            case mode::direct: break;
            case mode::resident:
                patch(node, tensor->slots, node->src[2]); // expert e is in slot e
                break;
            case mode::slots: patch(node, tensor->slots, layer->slot_ids); break;
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

// ---- lookup

// ids may be a view with strides: the first n_expert_used columns of a sorted [n_expert, n_tokens].
void executor::read_ids(pool & pool, const ggml_tensor * ids) {
    const auto start = std::chrono::steady_clock::now();
    ggml_backend_synchronize(inner_);
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

ggml_status executor::look_up(pool & pool, paged_layer & layer, const ggml_tensor * ids) {
    lookup_       = {};
    lookup_.layer = &layer;
    lookup_.ids   = ids;

    rotary_layer_stats delta = {};
    delta.lookups            = 1;
    delta.requests           = ggml_nelements(ids);
    if (layer.path != ROTARY_PATH_SLOTS) {
        // Every expert is there: nobody needs to know which ones are wanted.
        lookup_.how = layer.path == ROTARY_PATH_MAPPED ? mode::direct : mode::resident;
        delta.hits  = delta.requests;
        pool.count(layer, delta);
        return GGML_STATUS_SUCCESS;
    }
    read_ids(pool, ids);

    // Distinct experts, those that are resident first: a wave then begins with what needs no copy.
    std::vector<int32_t> order;
    std::vector<bool>    seen(layer.n_expert, false);
    for (const int32_t expert : ids_) {
        if (expert < 0 || expert >= layer.n_expert) {
            fail(ROTARY_ERR_ARG, format("%s: layer %d routed to expert %d of %d; the graph is broken",
                                        pool.config.model.c_str(), layer.il, expert, layer.n_expert));
            return GGML_STATUS_FAILED;
        }
        if (!seen[expert]) {
            seen[expert] = true;
            order.push_back(expert);
        }
    }
    const auto absent = std::stable_partition(order.begin(), order.end(),
                                              [&](int32_t expert) { return layer.table->slot_of(expert) >= 0; });

    delta.misses = order.end() - absent;
    delta.hits   = delta.requests - delta.misses;
    if ((int32_t) order.size() <= layer.table->n_slots()) {
        lookup_.how            = mode::slots;
        ggml_tensor * slot_ids = pool.slot_ids(layer, ids->ne[0], ids->ne[1]);
        if (slot_ids == nullptr) {
            fail(ROTARY_ERR_MEMORY, format("%s: no memory for %zu ids on the inner device; lower n_ubatch",
                                           pool.config.model.c_str(), ids_.size()));
            return GGML_STATUS_ALLOC_FAILED;
        }
        std::vector<rotary_load> loads(layer.table->n_slots());
        layer.slot_ids_host.resize(ids_.size());
        const int32_t n_loads =
            layer.table->resolve(ids_.data(), (int32_t) ids_.size(), layer.slot_ids_host.data(), loads.data());
        for (int32_t i = 0; i < n_loads; i++) {
            pool.page_in(inner_, layer, loads[i].expert, loads[i].slot);
            delta.evictions += loads[i].evicted >= 0;
        }
        delta.bytes_paged = n_loads * layer.expert_bytes;
        ggml_backend_tensor_set_async(inner_, slot_ids, layer.slot_ids_host.data(), 0, ggml_nbytes(slot_ids));
    } else if (layer.host_plain && pool.config.direct) {
        lookup_.how    = mode::direct;
        delta.bypassed = delta.misses;
    } else {
        lookup_.how = mode::waves;
        plan_waves(layer, order);
        for (const wave & each : lookup_.waves) {
            delta.bytes_paged += each.loads.size() * layer.expert_bytes;
            for (const rotary_load & load : each.loads) {
                delta.evictions += load.evicted >= 0;
            }
        }
        delta.waves = lookup_.waves.size() - 1;
    }
    pool.count(layer, delta);
    return GGML_STATUS_SUCCESS;
}

// ---- waves

void executor::plan_waves(paged_layer & layer, const std::vector<int32_t> & order) {
    // Some kernels limit the rows of one multiplication, and a wave's activations take memory.
    static constexpr int64_t max_rows = 8192;

    const size_t         n_slots = layer.table->n_slots();
    std::vector<int32_t> wave_of(layer.n_expert, -1);
    std::vector<int32_t> slot_of(layer.n_expert, -1);
    std::vector<int64_t> n_rows(layer.n_expert, 0);
    for (const int32_t expert : ids_) {
        n_rows[expert]++;
    }
    size_t n = 0; // experts of this wave
    for (size_t first = 0; first < order.size(); first += n) {
        int64_t rows = 0;
        for (n = 0; n < n_slots && first + n < order.size(); n++) {
            rows += n_rows[order[first + n]];
            if (n > 0 && rows > max_rows) {
                break;
            }
        }
        std::vector<int32_t> slots(n);
        wave                 next;
        next.loads.resize(n_slots);
        next.loads.resize(layer.table->resolve(&order[first], (int32_t) n, slots.data(), next.loads.data()));
        for (size_t i = 0; i < n; i++) {
            wave_of[order[first + i]] = (int32_t) lookup_.waves.size();
            slot_of[order[first + i]] = slots[i];
        }
        lookup_.waves.push_back(std::move(next));
    }
    for (size_t row = 0; row < ids_.size(); row++) {
        wave & its = lookup_.waves[wave_of[ids_[row]]];
        its.rows.push_back((int32_t) row);
        its.slots.push_back(slot_of[ids_[row]]);
    }
}

ggml_status executor::run_waves(pool & pool, ggml_tensor * node, paged_tensor & tensor) {
    lookup_.done.push_back(&tensor);
    for (const wave & each : lookup_.waves) {
        for (const rotary_load & load : each.loads) {
            pool.page_in(inner_, tensor, load.expert, load.slot);
        }
        const ggml_status status = run_wave(pool, node, tensor, each);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

// A leaf that stands for `tensor`'s memory as rows of ne0: without it, building a graph would pull in its history.
static ggml_tensor * rows_of(ggml_context * ctx, const ggml_tensor * tensor) {
    ggml_tensor * leaf = ggml_new_tensor_2d(ctx, tensor->type, tensor->ne[0], ggml_nrows(tensor));
    leaf->data         = tensor->data;
    leaf->buffer       = tensor->view_src ? tensor->view_src->buffer : tensor->buffer;
    return leaf;
}

ggml_status executor::run_wave(pool & pool, ggml_tensor * node, paged_tensor & tensor, const wave & its) {
    const ggml_tensor * input  = node->src[1]; // [ne0, 1 or n_expert_used, n_tokens]
    const int64_t       n_used = node->ne[1];
    const int64_t       n_rows = (int64_t) its.rows.size();
    if (!ggml_is_contiguous(input) || !ggml_is_contiguous(node) || input->type != GGML_TYPE_F32) {
        fail(ROTARY_ERR_STATE, format("%s: input of type %s is not contiguous F32; raise the budget so that a batch's "
                                      "experts fit, or lower n_ubatch",
                                      node->name, ggml_type_name(input->type)));
        return GGML_STATUS_FAILED;
    }

    std::vector<int32_t> from(n_rows);
    for (int64_t i = 0; i < n_rows; i++) {
        // One input row a token, shared by its experts, or one for each expert.
        from[i] = (int32_t) (its.rows[i] / n_used * input->ne[1] + its.rows[i] % n_used % input->ne[1]);
    }

    const ggml_context_ptr owner(
        ggml_init({ ggml_tensor_overhead() * 16 + ggml_graph_overhead_custom(16, false), nullptr, true }));
    ggml_context * ctx    = owner.get();
    ggml_tensor *  gather = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    ggml_tensor *  slots  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_rows);
    ggml_tensor *  to     = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    for (ggml_tensor * each : { gather, slots, to }) {
        ggml_set_input(each);
    }
    ggml_tensor * rows = ggml_get_rows(ctx, rows_of(ctx, input), gather);
    ggml_tensor * out  = ggml_mul_mat_id(ctx, tensor.slots, ggml_reshape_3d(ctx, rows, input->ne[0], 1, n_rows), slots);
    memcpy(out->op_params, node->op_params, sizeof(out->op_params));
    ggml_tensor * scattered =
        ggml_set_rows(ctx, rows_of(ctx, node), ggml_reshape_2d(ctx, out, node->ne[0], n_rows), to);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 16, false);
    ggml_build_forward_expand(graph, scattered);

    for (const ggml_tensor * op : { rows, scattered }) {
        if (!ggml_backend_supports_op(inner_, op)) {
            fail(ROTARY_ERR_DEVICE, format("%s: has no %s, which a batch of more experts than slots needs; raise the "
                                           "budget or lower n_ubatch",
                                           ggml_backend_name(inner_), ggml_op_name(op->op)));
            return GGML_STATUS_FAILED;
        }
    }
    if (!ggml_gallocr_alloc_graph(pool.scratch(), graph)) {
        fail(ROTARY_ERR_MEMORY, format("%s: no memory for the activations of %lld rows; lower n_ubatch",
                                       ggml_backend_name(inner_), (long long) n_rows));
        return GGML_STATUS_ALLOC_FAILED;
    }
    pool.set_scratch_bytes(ggml_gallocr_get_buffer_size(pool.scratch(), 0));

    ggml_backend_tensor_set_async(inner_, gather, from.data(), 0, ggml_nbytes(gather));
    ggml_backend_tensor_set_async(inner_, slots, its.slots.data(), 0, ggml_nbytes(slots));
    ggml_backend_tensor_set_async(inner_, to, its.rows.data(), 0, ggml_nbytes(to));
    // Waits at the end: the next wave overwrites the slots, the scratch and these arrays.
    return ggml_backend_graph_compute(inner_, graph);
}

// The slot table already tells the state after the last wave; a tensor that this graph did not touch must get there too.
void executor::finish_lookup(pool & pool) {
    if (lookup_.layer != nullptr && lookup_.how == mode::waves) {
        for (paged_tensor * tensor : lookup_.layer->tensors) {
            if (std::find(lookup_.done.begin(), lookup_.done.end(), tensor) != lookup_.done.end()) {
                continue;
            }
            for (int32_t slot = 0; slot < lookup_.layer->table->n_slots(); slot++) {
                const int32_t expert = lookup_.layer->table->expert_of(slot);
                if (expert >= 0) {
                    pool.page_in(inner_, *tensor, expert, slot);
                }
            }
        }
    }
    lookup_ = {};
}

} // namespace rotary
