// SPDX-License-Identifier: MIT
//
// Memory governor. See memory_governor.hpp.

#include "model/memory_governor.hpp"

#include "base/clock.hpp"
#include "base/error.hpp"
#include "base/memory.hpp"
#include "model/available_memory.hpp"
#include "model/rebalancing.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

static constexpr uint64_t interval_us = 250 * 1000;

void memory_governor::start() {
    seen_us_ = now_us();
}

void memory_governor::follow() {
    const auto & layers = model_.experts.layers();
    if (!model_.inner_is_host() || now_us() - seen_us_ < interval_us || !sized_.has_slots() ||
        std::none_of(layers.begin(), layers.end(), [](const auto & layer) { return layer->table != nullptr; })) {
        return;
    }
    seen_us_ = now_us();

    const host_memory memory = host_memory_now();
    const uint64_t    now    = model_.stats.all().slot_bytes + model_.rebalancer.spare();
    const uint64_t    wanted = bytes_wanted(memory, now);
    if (wanted == now) {
        return;
    }
    resize(wanted);
    const uint64_t slot_bytes = model_.stats.all().slot_bytes;
    if (slot_bytes < now) {
        uint64_t n_shrinks = 0;
        model_.stats.update([&](rotary_stats & totals) { n_shrinks = ++totals.shrinks; });
        const std::string text =
            format("%s: memory runs short, %s are available: slots shrink from %s to %s", model_.config.name.c_str(),
                   mib(memory.available).c_str(), mib(now).c_str(), mib(slot_bytes).c_str());
        if (n_shrinks == 1) {
            model_.notices.say(text);
        } else {
            GGML_LOG_WARN("rotary: %s\n", text.c_str());
        }
    }
    if (model_.config.wanted.what == budget::kind::automatic) {
        model_.stats.update([](rotary_stats & totals) { totals.budget_bytes = totals.slot_bytes; });
    }
}

// Between half of the margin and one and a half nothing changes, so that sizes do not swing; except that below the
// margin, slots shrink if processes wait for memory.
uint64_t memory_governor::bytes_wanted(const host_memory & memory, uint64_t now) {
    static constexpr double too_much = 20.0; // percent of time waiting for memory

    const uint64_t margin = margin_bytes(model_, memory.total);
    if (memory.available < margin / 2 || (memory.available < margin && host_memory_pressure() > too_much)) {
        const uint64_t lack = margin - memory.available;
        return std::max(budget_min_bytes(model_.experts.layer_sizes()), now > lack ? now - lack : 0);
    }
    if (model_.store.direct() != nullptr && now < sized_.max_slot_bytes() && memory.available > margin + margin / 2 &&
        seen_us_ > growth_tried_us_ + 20 * interval_us) { // free_bytes() takes milliseconds
        growth_tried_us_    = seen_us_;
        const uint64_t more = free_bytes(model_);
        return std::min(now + (more > margin / 2 ? more : 0), sized_.max_slot_bytes());
    }
    return now;
}

void memory_governor::resize(uint64_t bytes) {
    const std::vector<int32_t> n_slots    = budget_slots(bytes, model_.experts.layer_sizes());
    uint64_t                   slot_bytes = 0;
    for (const auto & layer : model_.experts.layers()) {
        if (layer->table) {
            model_.targets.commit(*layer, true);
            const int32_t before = layer->table->n_slots();
            const int32_t now    = std::min(n_slots[layer->index], layer->n_allocated);
            layer->table->resize(now);
            if (now > before) {
                model_.slots.touch(*layer, before, now);
            } else {
                model_.slots.give_back(*layer, now, before);
            }
            model_.stats.set_slots(layer->index, now, layer->n_resident());
        }
        slot_bytes += layer->expert_bytes * layer->n_slots();
    }
    model_.stats.update([&](rotary_stats & totals) { totals.slot_bytes = slot_bytes; });
    start_rebalancing(model_);
}

} // namespace rotary
