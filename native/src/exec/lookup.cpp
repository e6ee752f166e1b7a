// SPDX-License-Identifier: MIT
//
// Lookup. See lookup.hpp.

#include "exec/lookup.hpp"

#include "base/clock.hpp"
#include "base/error.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace rotary {

bool lookup::make_events() {
    const bool made = filler_.make_event() && device_.make_events() && waves_.make_events();
    if (!made) {
        fail(ROTARY_ERR_DEVICE,
             format("%s: no event is left, by which copies of experts are ordered; close other models "
                    "on it",
                    ggml_backend_name(inner_)));
    }
    return made;
}

void lookup::begin_graph() {
    device_.begin_graph();
    prefetcher_.begin_graph();
}

void lookup::forget() {
    now_ = {};
    waves_.forget_plan();
}

// ---- reading the graph

// Waits for the inner backend. The ids may be a strided view: the first n_expert_used of a sorted [n_expert, n_tokens].
void lookup::read_ids(paged_model & model) {
    const ggml_tensor * ids   = now_.ids;
    const uint64_t      start = now_us();
    ggml_backend_synchronize(inner_);
    waves_.forget_in_flight();
    raw_ids_.resize(ggml_nbytes(ids));
    ggml_backend_tensor_get(ids, raw_ids_.data(), 0, raw_ids_.size());
    const uint64_t us = now_us() - start;
    model.stats.update([us](rotary_stats & totals) {
        totals.waits++;
        totals.wait_us += us;
    });
    ids_.resize(ggml_nelements(ids));
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (int64_t k = 0; k < ids->ne[0]; k++) {
            memcpy(&ids_[t * ids->ne[0] + k], &raw_ids_[t * ids->nb[1] + k * ids->nb[0]], sizeof(int32_t));
        }
    }
}

// The router's weights for the ids of node i, in the order of ids_. Empty where they are unknown: a GPU may fuse their
// computation and not keep them, and some models gather logits here, which become weights only later.
std::vector<float> lookup::read_weights(const paged_model & model, const ggml_cgraph * graph, int i) const {
    const ggml_tensor * ids = graph->nodes[i]->src[2];
    for (int j = i - 1; model.inner_is_host() && j >= 0; j--) {
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

// The layer's tensors in the order in which the graph uses them from node i on, those it does not use last.
static std::vector<paged_tensor *> order_of_use(const catalogue & experts, const paged_layer & layer,
                                                const ggml_cgraph * graph, int i) {
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
            const auto [owner, tensor] = experts.find(node->src[0]);
            if (owner == &layer) {
                add(tensor);
            }
        }
    }
    std::for_each(layer.tensors.begin(), layer.tensors.end(), add);
    return order;
}

void lookup::record(paged_model & model, const std::vector<float> & weights) const {
    std::vector<bool> resident;
    for (const int32_t expert : ids_) {
        resident.push_back(!now_.layer->table || now_.layer->table->slot_of(expert) >= 0);
    }
    model.trace.record(now_.layer->il, now_.ids->ne[0], ids_, weights, resident);
}

// ---- resolving

ggml_status lookup::resolve(pool & pool, paged_layer & layer, const ggml_cgraph * graph, int i) {
    paged_model &       model = pool.model;
    const ggml_tensor * node  = graph->nodes[i];
    forget();
    now_.layer = &layer;
    now_.ids   = node->src[2];
    if (layer.path != ROTARY_PATH_SLOTS) { // all experts are resident or mapped: only a trace needs the routing
        if (model.trace.on()) {
            read_ids(model);
            record(model, read_weights(model, graph, i));
        }
        now_.mode                = layer.path == ROTARY_PATH_MAPPED ? mode::mapped : mode::resident;
        rotary_layer_stats delta = {};
        delta.lookups            = 1;
        delta.requests = delta.hits = ggml_nelements(now_.ids);
        model.stats.count_lookup(layer.index, delta, layer.n_resident());
        return GGML_STATUS_SUCCESS;
    }
    if (!model.trace.on() && model.tables.resolves(layer.index, ggml_nelements(now_.ids))) {
        now_.mode = mode::on_device;
        return device_.resolve(pool, layer, node);
    }
    if (!model.tables.to_host(layer.index)) {
        return GGML_STATUS_FAILED;
    }
    return resolve_on_host(pool, graph, i);
}

// Each expert once, in the order of the ids. False with this thread's error if an id is out of range.
bool lookup::distinct_experts(const paged_model & model, std::vector<int32_t> & experts) const {
    std::vector<bool> seen(now_.layer->n_expert, false);
    for (const int32_t expert : ids_) {
        if (expert < 0 || expert >= now_.layer->n_expert) {
            fail(ROTARY_ERR_ARG, format("%s: layer %d routed to expert %d of %d; the graph is broken",
                                        model.config.name.c_str(), now_.layer->il, expert, now_.layer->n_expert));
            return false;
        }
        if (!seen[expert]) {
            seen[expert] = true;
            experts.push_back(expert);
        }
    }
    return true;
}

static void count_loads(const paged_layer & layer, const std::vector<rotary_load> & loads, rotary_layer_stats & delta) {
    delta.bytes_paged += loads.size() * layer.expert_bytes;
    delta.evictions += std::count_if(loads.begin(), loads.end(), [](const auto & load) { return load.evicted >= 0; });
}

ggml_status lookup::resolve_on_host(pool & pool, const ggml_cgraph * graph, int i) {
    paged_model &  model  = pool.model;
    paged_layer &  layer  = *now_.layer;
    slot_table &   table  = *layer.table;
    direct_store * direct = model.store.direct();
    const auto     n_used = (int32_t) now_.ids->ne[0], n_tokens = (int32_t) now_.ids->ne[1];
    read_ids(model);
    if (direct != nullptr) {
        prefetcher_.begin_lookup(*direct, n_tokens);
    }
    now_.order = order_of_use(model.experts, layer, graph, i);
    std::vector<int32_t> experts;
    if (!distinct_experts(model, experts)) {
        return GGML_STATUS_FAILED;
    }
    const std::vector<float> weights =
        model.trace.on() || table.wants_weights() ? read_weights(model, graph, i) : std::vector<float>();
    if (model.trace.on()) {
        record(model, weights);
    }
    if (direct != nullptr) {
        direct->cancel_queued();
        direct->notice();
        if (experts.size() + table.reserved().size() > (size_t) table.n_slots()) {
            model.targets.commit(layer, true); // slots reserved for prefetches are needed
        }
    }
    // Resident experts first, so that the first wave copies as little as it can; then absent ones in the file's order.
    const auto absent = std::stable_partition(experts.begin(), experts.end(),
                                              [&](int32_t expert) { return table.slot_of(expert) >= 0; });
    std::sort(absent, experts.end());
    table.note(ids_.data(), weights.empty() ? nullptr : weights.data(), n_used, n_tokens);
    model.rebalancer.note(layer.index, ids_.data(), n_used, n_tokens);
    pool.predicted.note(layer, ids_, n_used);

    now_.n_hits              = absent - experts.begin();
    rotary_layer_stats delta = {};
    delta.lookups            = 1;
    delta.requests           = ids_.size();
    delta.misses             = experts.size() - now_.n_hits;
    delta.hits               = delta.requests - delta.misses;
    if ((int32_t) experts.size() <= table.n_slots()) {
        now_.mode = mode::slots;
        if (!place_in_slots(model, delta)) {
            return GGML_STATUS_ALLOC_FAILED;
        }
    } else if (layer.maps_plain && model.config.compute_from_mapping) {
        now_.mode      = mode::mapped;
        delta.bypassed = delta.misses;
    } else {
        now_.mode = mode::waves;
        waves_.plan(model, layer, ids_, experts, now_.n_hits);
        for (const wave & each : waves_.planned()) {
            count_loads(layer, each.loads, delta);
        }
        delta.waves = waves_.planned().size() - 1;
    }
    model.stats.count_lookup(layer.index, delta, layer.n_resident());
    if (direct != nullptr) {
        start_reads(pool, experts, graph->nodes[i]);
    }
    const ggml_status status = now_.mode == mode::slots ? fill_ready(model) : GGML_STATUS_SUCCESS;
    prefetcher_.end_lookup();
    return status;
}

// Give each expert a slot and send the slot ids to the inner device. False with this thread's error.
bool lookup::place_in_slots(paged_model & model, rotary_layer_stats & delta) {
    const paged_layer & layer    = *now_.layer;
    ggml_tensor *       slot_ids = model.lookup_memory.slot_ids(layer.index, now_.ids->ne[0], now_.ids->ne[1]);
    if (slot_ids == nullptr) {
        fail(ROTARY_ERR_MEMORY, format("%s: no memory for %zu ids on the inner device; lower n_ubatch",
                                       model.config.name.c_str(), ids_.size()));
        return false;
    }
    std::vector<int32_t> & on_host = model.lookup_memory.slot_ids_on_host(layer.index);
    on_host.resize(ids_.size());
    now_.loads.resize(layer.table->n_slots());
    now_.loads.resize(layer.table->place(ids_.data(), (int32_t) ids_.size(), on_host.data(), now_.loads.data()));
    std::sort(now_.loads.begin(), now_.loads.end(),
              [](const rotary_load & a, const rotary_load & b) { return a.expert < b.expert; });
    count_loads(layer, now_.loads, delta);
    ggml_backend_tensor_set_async(inner_, slot_ids, on_host.data(), 0, ggml_nbytes(slot_ids));
    return true;
}

// ---- reading

// Start this lookup's reads in the direct store, then prefetches for the next layers.
void lookup::start_reads(pool & pool, const std::vector<int32_t> & experts, const ggml_tensor * node) {
    paged_model &            model  = pool.model;
    direct_store &           direct = *model.store.direct();
    const prefetcher::lookup seen   = { now_.layer, node, now_.order, experts, now_.loads, now_.mode == mode::slots };
    prefetcher_.learn(model, pool.predicted, seen);
    demand(model);
    for (const paged_tensor * tensor : now_.layer->tensors) {
        direct.cancel(*tensor); // prefetches that this lookup does not want
    }
    model.targets.commit(*now_.layer, false);
    direct.pump();
    if (pool.predicted.on()) {
        prefetcher_.predict(model, pool.predicted, seen);
        direct.pump();
    }
    model.store.count_reads();
}

// Request the absent experts, straight into their slots where these are read targets. Statistics count an expert once,
// at the layer's first tensor with direct I/O (`leader`).
void lookup::demand(paged_model & model) {
    direct_store & direct = *model.store.direct();
    const auto leader = std::find_if(now_.order.begin(), now_.order.end(), [](auto * each) { return each->direct_io; });
    uint64_t   n_used = 0, n_late = 0;
    const auto want = [&](const paged_tensor & tensor, int32_t expert, char * target) {
        const direct_store::found found = direct.demand(tensor, expert, target);
        if (&tensor == *leader && found != direct_store::found::absent) {
            n_used++;
            n_late += !std::all_of(now_.order.begin(), now_.order.end(),
                                   [&](const auto * each) { return !each->direct_io || direct.landed(*each, expert); });
        }
    };
    for (paged_tensor * tensor : now_.layer->tensors) {
        tensor->counts_expert = leader != now_.order.end() && tensor == *leader;
    }
    const std::vector<int32_t> slots = model.targets.slots_for(*now_.layer, now_.loads);
    for (const paged_tensor * tensor : now_.order) {
        if (!tensor->direct_io) {
            continue;
        }
        for (size_t i = 0; i < now_.loads.size(); i++) {
            if (slots[i] != read_targets::in_ram) {
                want(*tensor, now_.loads[i].expert, slots[i] >= 0 ? model.targets.at(*tensor, slots[i]) : nullptr);
            }
        }
        for (const wave & each : waves_.planned()) {
            for (const rotary_load & load : each.loads) {
                if (!model.store.fetchable(*tensor, load.expert) || direct.knows(*tensor, load.expert)) {
                    want(*tensor, load.expert, nullptr);
                }
            }
        }
    }
    model.stats.update([&](rotary_stats & totals) {
        totals.prefetch_used += n_used;
        totals.late_hits += n_late;
    });
}

// ---- filling

bool lookup::is_done(const paged_tensor & tensor) const {
    return std::find(now_.done.begin(), now_.done.end(), &tensor) != now_.done.end();
}

// Fill all tensors whose experts have landed, in one go.
ggml_status lookup::fill_ready(paged_model & model) {
    std::vector<fill_job> jobs;
    for (const paged_tensor * tensor : now_.order) {
        const bool all = std::all_of(now_.loads.begin(), now_.loads.end(), [&](const rotary_load & load) {
            return model.store.fetchable(*tensor, load.expert);
        });
        if (all) {
            add_jobs(*tensor, now_.loads, jobs);
            now_.done.push_back(tensor);
        }
    }
    return fill(model, jobs);
}

ggml_status lookup::fill(paged_model & model, const paged_tensor & tensor) {
    std::vector<fill_job> jobs;
    add_jobs(tensor, now_.loads, jobs);
    now_.done.push_back(&tensor);
    return fill(model, jobs);
}

// The slot table already describes the state after this lookup, so tensors that the graph did not use are filled too.
ggml_status lookup::finish(pool & pool) {
    std::vector<fill_job> jobs;
    if (now_.layer != nullptr && (now_.mode == mode::waves || now_.mode == mode::slots)) {
        const slot_table & table = *now_.layer->table;
        for (const paged_tensor * tensor : now_.layer->tensors) {
            for (int32_t slot = 0; !is_done(*tensor) && slot < table.n_slots(); slot++) {
                const int32_t expert = table.expert_of(slot);
                const bool    loaded = std::any_of(now_.loads.begin(), now_.loads.end(),
                                                   [&](const rotary_load & load) { return load.expert == expert; });
                if (expert >= 0 && (now_.mode == mode::waves || loaded)) {
                    jobs.push_back({ tensor, tensor->slots, expert, slot });
                }
            }
        }
    }
    forget();
    return fill(pool.model, jobs);
}

// ---- passes

ggml_status lookup::run_waves(paged_model & model, ggml_tensor * node, const paged_tensor & tensor) {
    now_.done.push_back(&tensor);
    return waves_.run(model, node, tensor);
}

// Two passes cost two small graphs, so they pay only if the expected wait is longer.
bool lookup::worth_splitting(const paged_model & model, const ggml_tensor * node) const {
    static constexpr double min_us = 400;

    const direct_store * direct = model.store.direct();
    return direct != nullptr && now_.n_hits > 0 && ggml_is_contiguous(node->src[1]) &&
           direct->expected_wait_us() > min_us;
}

ggml_status lookup::run_hits_first(paged_model & model, ggml_tensor * node, const paged_tensor & tensor) {
    waves_.plan_hits_first(ids_, model.lookup_memory.slot_ids_on_host(now_.layer->index), now_.loads, now_.n_hits);
    return run_waves(model, node, tensor);
}

} // namespace rotary
