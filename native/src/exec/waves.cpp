// SPDX-License-Identifier: MIT
//
// Waves. See waves.hpp.

#include "exec/waves.hpp"

#include "base/error.hpp"
#include "base/inner_device.hpp"

#include <algorithm>
#include <cstring>

namespace rotary {

bool wave_runner::make_events() {
    return make_event(computed_[0], inner_) && make_event(computed_[1], inner_);
}

void add_jobs(const paged_tensor & tensor, const std::vector<rotary_load> & loads, std::vector<fill_job> & jobs) {
    for (const rotary_load & load : loads) {
        jobs.push_back({ &tensor, tensor.slots, load.expert, load.slot });
    }
}

// ---- planning

void wave_runner::plan(paged_model & model, const paged_layer & layer, const std::vector<int32_t> & ids,
                       const std::vector<int32_t> & order, size_t n_hits) {
    // Some kernels limit the rows of one multiplication, and a wave's activations take memory.
    static constexpr int64_t max_rows = 2048;

    const size_t         n_slots = layer.table->n_slots();
    std::vector<int32_t> wave_of(layer.n_expert, -1);
    std::vector<int32_t> slot_of(layer.n_expert, -1);
    std::vector<int64_t> n_rows(layer.n_expert, 0);
    for (const int32_t expert : ids) {
        n_rows[expert]++;
    }
    // The next wave is read or copied while one is computed, so each gets half of the staging area or of the slots.
    const direct_store * direct      = model.store.direct();
    const bool           at_once     = direct == nullptr && !model.transfer.is_used();
    size_t               max_experts = model.transfer.is_used() ? std::max<size_t>(n_slots / 2, 1) : n_slots;
    if (direct != nullptr) {
        size_t largest = 1;
        for (const paged_tensor * tensor : layer.tensors) {
            largest = std::max(largest, tensor->expert_bytes);
        }
        max_experts = std::clamp<size_t>(direct->staging_bytes() / 2 / largest, 1, max_experts);
    }
    std::vector<int32_t> before; // experts of the previous wave, which may still be in use
    size_t               n = 0;  // number of experts in this wave
    for (size_t first = 0; first < order.size(); first += n) {
        const size_t end  = at_once          ? std::min(first + n_slots, order.size())
                            : first < n_hits ? n_hits
                                             : std::min(first + max_experts, order.size());
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
            wave_of[order[first + i]] = (int32_t) waves_.size();
            slot_of[order[first + i]] = slots[i];
        }
        waves_.push_back(std::move(next));
    }
    for (size_t row = 0; row < ids.size(); row++) {
        wave & each = waves_[wave_of[ids[row]]];
        each.rows.push_back((int32_t) row);
        each.slots.push_back(slot_of[ids[row]]);
    }
}

void wave_runner::plan_hits_first(const std::vector<int32_t> & ids, const std::vector<int32_t> & slot_ids,
                                  const std::vector<rotary_load> & loads, size_t n_hits) {
    if (!waves_.empty()) {
        return;
    }
    waves_.resize(2);
    waves_[0].n_experts = n_hits;
    waves_[1].n_experts = loads.size();
    waves_[1].loads     = loads;
    for (size_t row = 0; row < ids.size(); row++) {
        const bool loaded =
            std::any_of(loads.begin(), loads.end(), [&](const rotary_load & load) { return load.expert == ids[row]; });
        wave & each = waves_[loaded ? 1 : 0];
        each.rows.push_back((int32_t) row);
        each.slots.push_back(slot_ids[row]);
    }
}

// ---- running

ggml_status wave_runner::run(paged_model & model, ggml_tensor * node, const paged_tensor & tensor) {
    const paged_layer & layer = model.experts.layer_of(tensor);
    for (size_t i = 0; i < waves_.size(); i++) {
        const wave &          each = waves_[i];
        std::vector<fill_job> jobs;
        add_jobs(tensor, each.loads, jobs);
        ggml_status status = wait_for_slots(model, layer, i)
                                 ? filler_.fill(model.store, model.transfer, model.stats, jobs)
                                 : GGML_STATUS_FAILED;
        if (status == GGML_STATUS_SUCCESS) {
            status = run_wave(model, node, tensor, each);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        if (model.transfer.is_used()) {
            ggml_backend_event_record(computed_[i % 2].get(), inner_);
        }
    }
    return GGML_STATUS_SUCCESS;
}

// Make the link wait for the last wave that reads the slots which wave `index` overwrites. plan() held the slots of the
// previous wave if there was room for both, so then it is the wave before that one.
bool wave_runner::wait_for_slots(paged_model & model, const paged_layer & layer, size_t index) {
    if (!model.transfer.is_used() || index == 0) {
        return true; // the host has waited for the routing, so for everything before it too
    }
    const size_t n_experts = waves_[index - 1].n_experts + waves_[index].n_experts;
    const size_t reader    = n_experts <= (size_t) layer.table->n_slots() ? 2 : 1; // how many waves ago
    return index < reader || model.transfer.over()->wait(computed_[(index - reader) % 2].get());
}

// A leaf over `tensor`'s memory as rows of ne0; the tensor itself would pull the nodes that compute it into the graph.
static ggml_tensor * rows_of(ggml_context * ctx, const ggml_tensor * tensor) {
    ggml_tensor * leaf = ggml_new_tensor_2d(ctx, tensor->type, tensor->ne[0], ggml_nrows(tensor));
    leaf->data         = tensor->data;
    leaf->buffer       = tensor->view_src ? tensor->view_src->buffer : tensor->buffer;
    return leaf;
}

ggml_status wave_runner::run_wave(paged_model & model, ggml_tensor * node, const paged_tensor & tensor,
                                  const wave & now) {
    const ggml_tensor * input  = node->src[1]; // [ne0, 1 or n_expert_used, n_tokens]
    const int64_t       n_used = node->ne[1];
    const int64_t       n_rows = (int64_t) now.rows.size();
    if (!ggml_is_contiguous(input) || !ggml_is_contiguous(node) || input->type != GGML_TYPE_F32) {
        fail(ROTARY_ERR_STATE, format("%s: input of type %s is not contiguous F32; raise the budget so that a batch's "
                                      "experts fit, or lower n_ubatch",
                                      node->name, ggml_type_name(input->type)));
        return GGML_STATUS_FAILED;
    }

    // Copies, since the inner backend may read them after the lookup has ended.
    in_flight_.push_back({ std::vector<int32_t>(n_rows), now.slots, now.rows });
    wave_rows & sources = in_flight_.back();
    for (int64_t i = 0; i < n_rows; i++) {
        // A token has one input row for all its experts, or one for each.
        sources.from[i] = (int32_t) (now.rows[i] / n_used * input->ne[1] + now.rows[i] % n_used % input->ne[1]);
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
    if (!model.lookup_memory.place_in_scratch(inner_, { gather, slots, to, rows, out })) {
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
    if (model.transfer.is_used()) {
        return ggml_backend_graph_compute_async(inner_, graph);
    }
    // Wait: the next wave's experts are copied into slots that this wave reads.
    const ggml_status status = ggml_backend_graph_compute(inner_, graph);
    in_flight_.clear();
    return status;
}

} // namespace rotary
