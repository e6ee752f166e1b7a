// SPDX-License-Identifier: MIT
//
// Paged model: operations on all of its parts. See paged_model.hpp.

#include "model/paged_model.hpp"

namespace rotary {

void paged_model::forget_slots() {
    store.clear();
    way.synchronize(); // lookups that were enqueued before the failure still change tables
    for (const auto & layer : experts.layers()) {
        if (layer->table) {
            layer->table->clear();
        }
    }
    tables.forget();
}

void paged_model::release() {
    store.clear(); // first: waits for reads into slots
    tables.free();
    store.ram().free();
    memory.free();
    slots.free();
    experts.clear_layers();
    stats.set_layers({});
    stats.update([](rotary_stats & totals) { totals.slot_bytes = totals.ram_bytes = 0; });
}

} // namespace rotary
