// SPDX-License-Identifier: MIT
//
// Rebalancing. See rebalancing.hpp.

#include "model/rebalancing.hpp"

#include <algorithm>

namespace rotary {

void start_rebalancing(paged_model & model) {
    std::vector<rebalancer::layer_slots> sizes;
    for (const auto & layer : model.experts.layers()) {
        const int32_t n = layer->n_slots();
        sizes.push_back({ layer->n_expert, n, layer->n_expert_used,
                          std::min(rebalancer::max_slots(n, layer->n_expert), layer->n_allocated),
                          layer->expert_bytes });
    }
    model.rebalancer = model.config.adaptive && model.inner_is_host() ? rebalancer(sizes) : rebalancer();
}

void rebalance(paged_model & model, ggml_backend_t user) {
    rebalancer::step step;
    if (!model.rebalancer.propose(step)) {
        return;
    }
    paged_layer & from = *model.experts.layers()[step.from];
    paged_layer & to   = *model.experts.layers()[step.to];
    model.targets.commit(from, false);
    if (!from.table->reserved().empty()) {
        return; // prefetches are in flight: the next graph tries again
    }
    ggml_backend_synchronize(user);
    for (int32_t i = 0; i < step.n; i++) {
        const rotary_load moved = from.table->shrink();
        const int32_t     last  = from.table->n_slots();
        if (moved.expert >= 0) {
            model.slots.copy(from, last, moved.slot);
        }
        model.slots.give_back(from, last, last + 1);
    }
    to.table->resize(to.table->n_slots() + 1);
    model.rebalancer.commit(step);
    for (const paged_layer * each : { &from, &to }) {
        model.stats.set_slots(each->index, each->n_slots(), each->n_resident());
    }
    model.stats.update([&](rotary_stats & totals) {
        totals.slot_bytes += to.expert_bytes;
        totals.slot_bytes -= from.expert_bytes * step.n;
        totals.slot_moves++;
    });
}

} // namespace rotary
