// SPDX-License-Identifier: MIT
//
// Executor: one multiplication in several passes, the waves. See executor.hpp.
//
// Each wave fills slots and multiplies the rows routed to their experts, gathered into a small graph of its own. An
// expert's rows are always all in one wave, and a row's result does not depend on the others, so the output is the same
// bit for bit where the kernel is the same. Waves serve a batch that wants more experts than there are slots, and a
// lookup that waits for the disk: the experts that are there are computed first.
//
// With a link, nobody waits for a wave: while one is computed, the next one's experts are copied, into the other half of
// the slots. So each absent expert crosses the bus once, and a layer streams through a double buffer.

#include "base/error.hpp"
#include "exec/executor.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

namespace rotary {

void executor::plan_waves(const pool & pool, paged_layer & layer, const std::vector<int32_t> & order, size_t n_hits) {
    // Some kernels limit the rows of one multiplication, and a wave's activations take memory.
    static constexpr int64_t max_rows = 2048;

    const size_t         n_slots = layer.table->n_slots();
    std::vector<int32_t> wave_of(layer.n_expert, -1);
    std::vector<int32_t> slot_of(layer.n_expert, -1);
    std::vector<int64_t> n_rows(layer.n_expert, 0);
    for (const int32_t expert : ids_) {
        n_rows[expert]++;
    }
    // Reads go on while a wave is computed: half of the staging area for each of the two. Copies do: half of the slots.
    const bool at_once = pool.direct() == nullptr && !pool.copies_by_link();
    size_t     most    = pool.copies_by_link() ? std::max<size_t>(n_slots / 2, 1) : n_slots;
    if (pool.direct() != nullptr) {
        size_t largest = 1;
        for (const paged_tensor * tensor : layer.tensors) {
            largest = std::max(largest, tensor->expert_bytes);
        }
        most = std::clamp<size_t>(pool.direct()->staging_bytes() / 2 / largest, 1, most);
    }
    std::vector<int32_t> before; // experts of the wave before, which may still be computed
    size_t               n = 0;  // experts of this wave
    for (size_t first = 0; first < order.size(); first += n) {
        const size_t end  = at_once          ? std::min(first + n_slots, order.size())
                            : first < n_hits ? n_hits
                                             : std::min(first + most, order.size());
        int64_t      rows = 0;
        for (n = 0; first + n < end; n++) {
            rows += n_rows[order[first + n]];
            if (n > 0 && rows > max_rows) {
                break;
            }
        }
        std::vector<int32_t> slots(n);
        wave                 next;
        next.n_experts = n;
        next.loads.resize(n_slots);
        if (before.size() + n > n_slots) {
            before.clear();
        }
        next.loads.resize(layer.table->place(&order[first], (int32_t) n, slots.data(), next.loads.data(), before));
        before.assign(&order[first], &order[first] + n);
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
    for (size_t i = 0; i < lookup_.waves.size(); i++) {
        const wave &          each = lookup_.waves[i];
        std::vector<fill_job> jobs;
        for (const rotary_load & load : each.loads) {
            jobs.push_back({ &tensor, load.expert, load.slot });
        }
        ggml_status status = wait_for_slots(pool, i) ? filler_.fill(pool, jobs) : GGML_STATUS_FAILED;
        if (status == GGML_STATUS_SUCCESS) {
            status = run_wave(pool, node, tensor, each);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        if (pool.copies_by_link()) {
            ggml_backend_event_record(wave_[i % 2].get(), inner_);
        }
    }
    return GGML_STATUS_SUCCESS;
}

// Have the link wait for the computation that reads the slots wave `index` will overwrite. Those are the ones used longest
// ago, so not the wave's before if there is room for both.
bool executor::wait_for_slots(pool & pool, size_t index) {
    if (!pool.copies_by_link() || index == 0) {
        return true; // the routing was waited for, and so was everything before it
    }
    const size_t n_experts = lookup_.waves[index - 1].n_experts + lookup_.waves[index].n_experts;
    const size_t reader    = n_experts <= (size_t) lookup_.layer->table->n_slots() ? 2 : 1; // so many waves ago
    return index < reader || pool.side()->wait(wave_[(index - reader) % 2].get());
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

    // Copied, as the wave may outlive its lookup.
    in_flight_.push_back({ std::vector<int32_t>(n_rows), its.slots, its.rows });
    wave_rows & sources = in_flight_.back();
    for (int64_t i = 0; i < n_rows; i++) {
        // One input row a token, shared by its experts, or one for each expert.
        sources.from[i] = (int32_t) (its.rows[i] / n_used * input->ne[1] + its.rows[i] % n_used % input->ne[1]);
    }

    const ggml_context_ptr owner(
        ggml_init({ ggml_tensor_overhead() * 16 + ggml_graph_overhead_custom(16, false), nullptr, true }));
    ggml_context * ctx    = owner.get();
    ggml_tensor *  gather = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    ggml_tensor *  slots  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_rows);
    ggml_tensor *  to     = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    ggml_tensor *  rows   = ggml_get_rows(ctx, rows_of(ctx, input), gather);
    ggml_tensor *  three  = ggml_reshape_3d(ctx, rows, input->ne[0], 1, n_rows);
    ggml_tensor *  out    = ggml_mul_mat_id(ctx, tensor.slots, three, slots);
    ggml_tensor *  two    = ggml_reshape_2d(ctx, out, node->ne[0], n_rows);
    memcpy(out->op_params, node->op_params, sizeof(out->op_params));
    ggml_tensor * scattered = ggml_set_rows(ctx, rows_of(ctx, node), two, to);
    ggml_cgraph * graph     = ggml_new_graph_custom(ctx, 16, false);
    ggml_build_forward_expand(graph, scattered);

    for (const ggml_tensor * op : { rows, scattered }) {
        if (!ggml_backend_supports_op(inner_, op)) {
            fail(ROTARY_ERR_DEVICE, format("%s: has no %s, which a batch of more experts than slots needs; raise the "
                                           "budget or lower n_ubatch",
                                           ggml_backend_name(inner_), ggml_op_name(op->op)));
            return GGML_STATUS_FAILED;
        }
    }
    if (!pool.place_in_scratch(inner_, { gather, slots, to, rows, out })) {
        fail(ROTARY_ERR_MEMORY, format("%s: no memory for the activations of %lld rows; lower n_ubatch",
                                       ggml_backend_name(inner_), (long long) n_rows));
        return GGML_STATUS_ALLOC_FAILED;
    }
    for (ggml_tensor * view : { three, two, scattered }) {
        ggml_backend_view_init(view);
    }

    ggml_backend_tensor_set_async(inner_, gather, sources.from.data(), 0, ggml_nbytes(gather));
    ggml_backend_tensor_set_async(inner_, slots, sources.slots.data(), 0, ggml_nbytes(slots));
    ggml_backend_tensor_set_async(inner_, to, sources.to.data(), 0, ggml_nbytes(to));
    if (pool.copies_by_link()) {
        return ggml_backend_graph_compute_async(inner_, graph);
    }
    // The next wave's experts are copied into slots that this one reads, and nobody else waits for it.
    const ggml_status status = ggml_backend_graph_compute(inner_, graph);
    in_flight_.clear();
    return status;
}

// ---- split

// Two passes cost two small graphs; that pays only if the wait is longer.
bool executor::worth_splitting(const pool & pool, const ggml_tensor * node) const {
    static constexpr double least_us = 400;
    return pool.direct() != nullptr && lookup_.n_hits > 0 && ggml_is_contiguous(node->src[1]) &&
           pool.direct()->expected_wait_us() > least_us;
}

// The rows of resident experts, then those that are still being read.
void executor::split_rows(const paged_layer & layer) {
    if (!lookup_.waves.empty()) {
        return;
    }
    lookup_.waves.resize(2);
    lookup_.waves[0].n_experts = lookup_.n_hits;
    lookup_.waves[1].n_experts = lookup_.loads.size();
    lookup_.waves[1].loads     = lookup_.loads;
    for (size_t row = 0; row < ids_.size(); row++) {
        const bool loaded = std::any_of(lookup_.loads.begin(), lookup_.loads.end(),
                                        [&](const rotary_load & load) { return load.expert == ids_[row]; });
        wave &     its    = lookup_.waves[loaded ? 1 : 0];
        its.rows.push_back((int32_t) row);
        its.slots.push_back(layer.slot_ids_host[row]);
    }
}

} // namespace rotary
