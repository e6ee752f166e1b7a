// SPDX-License-Identifier: MIT
//
// Device memory. See device_memory.hpp.

#include "model/device_memory.hpp"

#include "base/error.hpp"
#include "base/memory.hpp"
#include "cache/division.hpp"
#include "model/available_memory.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace rotary {

bool has_experts_on_device(const paged_model & model) {
    const auto & tensors = model.experts.tensors();
    return std::any_of(tensors.begin(), tensors.end(),
                       [&](const auto & tensor) { return model.transfer.pinned().on_device(*tensor) != nullptr; });
}

// ---- tier in RAM

// Bytes that the tier may take; ROTARY_RAM can only lower them.
static uint64_t ram_tier_bytes() {
    const host_memory memory = host_memory_now();
    const uint64_t    margin = host_margin(memory.total);
    const uint64_t    bytes  = memory.available > margin ? memory.available - margin : 0;
    budget            limit;
    const char *      asked   = getenv("ROTARY_RAM");
    const bool        limited = asked != nullptr && budget_parse(asked, limit) && limit.what == budget::kind::bytes;
    return limited ? std::min(bytes, (uint64_t) limit.value) : bytes;
}

void allocate_ram_tier(paged_model & model) {
    const char * inner = ggml_backend_dev_name(model.inner);
    const char * name  = model.config.name.c_str();
    model.store.ram().free();
    model.stats.update([](rotary_stats & totals) { totals.ram_bytes = 0; });
    if (model.store.direct() == nullptr || model.inner_is_host()) {
        return;
    }
    const uint64_t                     bytes   = ram_tier_bytes();
    const std::vector<int32_t>         n_slots = budget_slots(bytes, model.experts.layer_sizes());
    std::vector<ram_tier::layer_slots> wanted;
    bool                               any_paged = false;
    for (const auto & layer : model.experts.layers()) {
        ram_tier::layer_slots slots = {};
        any_paged                   = any_paged || layer->table;
        if (!n_slots.empty() && layer->table && layer->reads_whole_sectors()) {
            slots.n_slots = n_slots[layer->index];
            // Not the policy chosen: the tier sees only misses of the device's slots, not whole routings, and the
            // caller's own knows the device's slots by the same layer numbers.
            slots.table =
                std::make_unique<slot_table>(layer->n_expert, slots.n_slots,
                                             policy_new(best_on_device, { layer->n_expert, slots.n_slots, layer->index,
                                                                          layer->il, nullptr, nullptr }));
            std::copy_if(layer->tensors.begin(), layer->tensors.end(), std::back_inserter(slots.tensors),
                         [](const auto * tensor) { return tensor->direct_io; }); // the others are in RAM already
        }
        wanted.push_back(std::move(slots));
    }
    const auto none = [&](const std::string & reason) {
        model.notices.say(format("%s: no slots in RAM, so what %s does not hold is read from the disk each time: %s",
                                 name, inner, reason.c_str()));
    };
    const size_t size = ram_tier::bytes_for(wanted);
    if (size == 0) {
        if (any_paged && n_slots.empty()) {
            none(format("one token's experts do not fit into %s", mib(bytes).c_str()));
        } else if (any_paged) {
            none("experts are no whole sectors of the file");
        }
        return;
    }
    std::string         reason;
    ram_tier::allocator pinned;
    if (model.transfer.over() != nullptr && model.transfer.pinned().may_pin(size, reason)) {
        pinned = [&](size_t n) {
            return std::static_pointer_cast<char>(model.transfer.over()->new_pinned(n, reason).memory);
        };
    }
    if (!model.store.ram().allocate(std::move(wanted), pinned)) {
        none(format("the system refuses %s: %s", mib(size).c_str(), strerror(errno)));
        return;
    }
    model.stats.update([&](rotary_stats & totals) { totals.ram_bytes = size; });
    if (model.transfer.over() != nullptr && !model.store.ram().is_pinned()) {
        model.notices.say(format("%s: slots in RAM are not page-locked, so copies from them cost the host's time: %s",
                                 name, reason.c_str()));
    }
    GGML_LOG_INFO("rotary: %s: %s of slots in RAM in front of %s%s\n", name, mib(size).c_str(), inner,
                  model.store.ram().is_pinned() ? ", page-locked" : "");
}

// ---- page tables

bool allocate_device_tables(paged_model & model, const char * policy) {
    const char * asked = getenv("ROTARY_DEVICE_LOOKUPS"); // 0: the host resolves, for comparison
    link *       over  = asked != nullptr && strcmp(asked, "0") == 0 ? nullptr : model.transfer.over();
    std::vector<device_tables::layer> layers;
    for (const auto & layer : model.experts.layers()) {
        device_tables::layer wanted   = { layer->il, layer->n_expert, layer->expert_bytes, layer->table.get(), {}, 0 };
        bool                 readable = true;
        for (const paged_tensor * tensor : layer->tensors) {
            const char * store = model.transfer.pinned().on_device(*tensor);
            readable           = readable && store != nullptr;
            if (wanted.slots != nullptr) {
                wanted.tensors.push_back({ store, tensor->slots->data, tensor->expert_bytes, tensor->slots->nb[2] });
            }
            wanted.max_embd = std::max(wanted.max_embd, tensor->ne[0]); // at least n_embd, the first one's ne[0]
        }
        if (over != nullptr && wanted.slots != nullptr && readable && !wanted.slots->can_be_on_device()) {
            model.notices.say(
                format("%s: the host learns each routing and waits for it: policy %s cannot run on %s; lru and lfu can",
                       model.config.name.c_str(), policy, ggml_backend_dev_name(model.inner)));
            wanted.slots = nullptr;
        }
        layers.push_back(std::move(wanted));
    }
    std::string reason;
    const bool  fine = model.tables.allocate(over, layers, reason);
    if (fine && !reason.empty()) {
        model.notices.say(
            format("%s: the host learns each routing and waits for it: %s cannot count lookups for the host: %s",
                   model.config.name.c_str(), ggml_backend_dev_name(model.inner), reason.c_str()));
    }
    return fine;
}

} // namespace rotary
