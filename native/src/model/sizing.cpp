// SPDX-License-Identifier: MIT
//
// Sizing. See sizing.hpp.

#include "model/sizing.hpp"

#include "base/error.hpp"
#include "base/inner_device.hpp"
#include "base/memory.hpp"
#include "model/available_memory.hpp"
#include "model/device_memory.hpp"
#include "model/rebalancing.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

int32_t sizing::status() const {
    return status_ == ROTARY_OK ? ROTARY_OK : fail((rotary_status) status_, error_);
}

int32_t sizing::run() {
    const char * name = model_.config.name.c_str();
    done_             = true;
    model_.experts.build_layers();
    model_.lookup_memory.set_layers(model_.experts.layers().size());
    show_layers({});
    if (inner_starts_threads(model_.inner)) {
        model_.notices.say(format(
            "%s: this llama.cpp's CPU backend was built without OpenMP and starts its threads anew for each part "
            "of a graph; build it with GGML_OPENMP=ON",
            name));
    }

    const std::vector<layer_size> sizes     = model_.experts.layer_sizes();
    uint64_t                      one_token = 0;
    for (const layer_size & each : sizes) {
        one_token = std::max(one_token, each.expert_bytes * each.n_expert_used);
    }
    const uint64_t total  = host_memory_now().total;
    const uint64_t margin = model_.inner_is_host() ? margin_bytes(model_, total) : host_margin(total);
    model_.store.choose(margin, one_token, [this] { model_.transfer.pinned().unpin(); });
    if (!model_.inner_is_host()) {
        model_.transfer.open(model_.experts.stored());
    }

    uint64_t bytes = budget_bytes(model_.config.wanted, sizes, free_bytes(model_));
    if (is_automatic() && (model_.store.direct() != nullptr || !model_.inner_is_host())) {
        bytes = std::max(bytes, budget_min_bytes(sizes)); // from the margin, rather than fail
    }
    while (true) {
        const std::vector<int32_t> n_slots = budget_slots(bytes, sizes);
        if (n_slots.empty()) {
            error_  = budget_too_small(model_.config.name, model_.config.budget_text, bytes, sizes);
            status_ = fail(ROTARY_ERR_BUDGET, error_);
            break;
        }
        status_ = allocate(bytes, n_slots);
        if (status_ == ROTARY_OK) {
            break;
        }
        error_ = last_error();
        if (!is_automatic() || status_ != ROTARY_ERR_MEMORY) {
            break;
        }
        bytes = bytes / 10 * 9;
        model_.notices.say(format("%s: %s has no room for the slots; auto budget lowered to %s", name,
                                  ggml_backend_dev_name(model_.inner), mib(bytes).c_str()));
    }
    model_.store.count_reads();
    if (status_ != ROTARY_ERR_READ) {
        model_.stats.update([&](rotary_stats & totals) {
            totals.budget_bytes     = bytes;
            totals.min_budget_bytes = budget_min_bytes(sizes);
        });
    }
    return status_;
}

// ---- how much

// Slots to allocate so that a budget "auto" can grow: in host memory, address space costs nothing until it is touched.
std::vector<int32_t> sizing::with_room_to_grow(const std::vector<int32_t> & n_slots) const {
    if (!is_automatic() || model_.store.direct() == nullptr || !model_.inner_is_host()) {
        return n_slots;
    }
    const std::vector<layer_size> sizes = model_.experts.layer_sizes();
    std::vector<int32_t>          n_allocated =
        budget_slots(std::min(host_memory_now().available, budget_all_bytes(sizes)), sizes);
    n_allocated.resize(n_slots.size(), 0);
    for (size_t i = 0; i < n_slots.size(); i++) {
        n_allocated[i] = std::max(n_allocated[i], n_slots[i]);
    }
    return n_allocated;
}

// Slots to allocate so that layers can get slots from others. Systems refuse more address space than there is memory:
// then less, down to an eighth of the room, or none.
std::vector<int32_t> sizing::with_room_to_rebalance(const std::vector<int32_t> & n_slots,
                                                    const std::vector<int32_t> & n_allocated) const {
    const uint64_t available = host_memory_now().available;
    const auto &   layers    = model_.experts.layers();
    for (int32_t part = 1; model_.config.adaptive && model_.inner_is_host() && part <= 8; part *= 2) {
        std::vector<int32_t> n_wanted = n_allocated;
        uint64_t             bytes    = 0;
        for (size_t i = 0; i < n_slots.size(); i++) {
            if (n_slots[i] < layers[i]->n_expert) {
                const int32_t more = (rebalancer::max_slots(n_slots[i], layers[i]->n_expert) - n_slots[i]) / part;
                n_wanted[i]        = std::max(n_allocated[i], n_slots[i] + more);
            }
            bytes += layers[i]->expert_bytes * n_wanted[i];
        }
        if (bytes <= available) {
            return n_wanted;
        }
    }
    return n_allocated;
}

// ---- allocation

int32_t sizing::allocate(uint64_t bytes, const std::vector<int32_t> & n_slots) {
    const char *                  name        = model_.config.name.c_str();
    const std::vector<layer_size> sizes       = model_.experts.layer_sizes();
    const std::vector<int32_t>    n_allocated = with_room_to_grow(n_slots);
    max_slot_bytes_                           = 0;
    for (size_t i = 0; i < n_slots.size(); i++) {
        max_slot_bytes_ += sizes[i].expert_bytes * n_allocated[i];
    }
    const std::vector<int32_t> with_room = with_room_to_rebalance(n_slots, n_allocated);
    int32_t                    status    = allocate(n_slots, with_room);
    if (status == ROTARY_ERR_MEMORY && with_room != n_allocated) {
        const std::string why = last_error();
        status                = allocate(n_slots, n_allocated);
        if (status == ROTARY_OK) {
            model_.notices.say(
                format("%s: slots stay as they are divided between layers: no address space to rebalance them (%s)",
                       name, why.c_str()));
        }
    }
    if (status == ROTARY_OK) {
        const auto [fewest, most] = std::minmax_element(n_slots.begin(), n_slots.end());
        GGML_LOG_INFO("rotary: %s: experts of %zu layers (%s) paged on %s, budget %s is %s, %d to %d slots per layer\n",
                      name, n_slots.size(), mib(budget_all_bytes(sizes)).c_str(), ggml_backend_dev_name(model_.inner),
                      model_.config.budget_text.c_str(), mib(bytes).c_str(), *fewest, *most);
    }
    return status;
}

int32_t sizing::allocate(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated) {
    const char * name  = model_.config.name.c_str();
    const char * inner = ggml_backend_dev_name(model_.inner);
    model_.slots.free();
    lay_out(n_slots, n_allocated);
    uint64_t bytes = 0;
    for (const auto & layer : model_.experts.layers()) {
        bytes += layer->path == ROTARY_PATH_MAPPED ? 0 : layer->expert_bytes * layer->n_slots();
    }
    if (model_.inner_is_host() && bytes > host_memory_now().available) {
        return fail(ROTARY_ERR_MEMORY, format("%s: no memory for %s of slots, %s are available; lower the budget", name,
                                              mib(bytes).c_str(), mib(host_memory_now().available).c_str()));
    }
    if (!model_.slots.allocate(model_.experts)) {
        return fail(ROTARY_ERR_MEMORY,
                    format("%s: no memory for %s of slots on %s; lower the budget", name, mib(bytes).c_str(), inner));
    }
    for (const auto & layer : model_.experts.layers()) {
        if (layer->path == ROTARY_PATH_SLOTS && model_.inner_is_host()) {
            model_.slots.touch(*layer, 0, layer->n_slots());
        }
        if (fill_.fill(model_, *layer) != ROTARY_OK) {
            return last_status();
        }
        model_.stats.set_slots(layer->index, layer->n_slots(), layer->n_resident());
    }
    allocate_ram_tier(model_);
    if (!allocate_device_tables(model_, policy_)) {
        return fail(ROTARY_ERR_MEMORY, format("%s: no memory for page tables on %s; lower the budget", name, inner));
    }
    start_rebalancing(model_);
    model_.stats.update([&](rotary_stats & totals) { totals.slot_bytes = bytes; });
    return ROTARY_OK;
}

// Choose each layer's path and make its slot table. policy_ is a static string, because it is read while a graph runs.
void sizing::lay_out(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated) {
    const model_config & config = model_.config;
    policy_                     = config.own_policy != nullptr        ? "own"
                                  : config.policy != automatic_policy ? policy_name_of(config.policy)
                                  : has_experts_on_device(model_)     ? best_on_device
                                                                      : best_policy;
    const auto history          = routing_history_new((int32_t) n_slots.size());
    bool       repacked         = false;
    for (const auto & layer : model_.experts.layers()) {
        const int32_t n   = n_slots[layer->index];
        const bool    all = n == layer->n_expert;
        const bool    plain =
            model_.inner_is_host() && std::all_of(layer->tensors.begin(), layer->tensors.end(),
                                                  [&](const auto * tensor) { return model_.slots.is_plain(*tensor); });
        layer->maps_plain = plain && !layer->uses_direct_io();
        layer->path       = !all ? ROTARY_PATH_SLOTS : layer->maps_plain ? ROTARY_PATH_MAPPED : ROTARY_PATH_RESIDENT;
        layer->table.reset();
        if (!all) {
            layer->table =
                std::make_unique<slot_table>(layer->n_expert, n,
                                             policy_new(policy_.load(), { layer->n_expert, n, layer->index, layer->il,
                                                                          history, config.own_policy }));
        }
        layer->n_allocated      = n_allocated[layer->index];
        layer->reads_into_slots = plain && !all && layer->reads_whole_sectors();
        repacked                = repacked || (model_.inner_is_host() && !plain);
    }
    model_.store.ram().free();
    show_layers(n_slots);
    model_.stats.update([&](rotary_stats & totals) { totals.repacked = repacked; });
}

void sizing::show_layers(const std::vector<int32_t> & n_slots) const {
    std::vector<rotary_layer_stats> shown;
    for (const auto & layer : model_.experts.layers()) {
        rotary_layer_stats each = {};
        each.il                 = layer->il;
        each.n_expert           = layer->n_expert;
        each.n_expert_used      = layer->n_expert_used;
        each.path               = layer->path;
        each.expert_bytes       = layer->expert_bytes;
        each.n_slots            = n_slots.empty() ? 0 : layer->n_slots();
        each.n_resident         = n_slots.empty() ? 0 : layer->n_resident();
        shown.push_back(each);
    }
    model_.stats.set_layers(std::move(shown));
}

} // namespace rotary
