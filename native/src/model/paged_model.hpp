// SPDX-License-Identifier: MIT
//
// Paged model: all parts that page one model's experts on one inner device. Each part knows only those declared before
// it; only the pool makes and destroys them.
// Threading: the pool's lock guards all parts but the figures, which have locks of their own.

#pragma once

#include "cache/rebalancer.hpp"
#include "link/device_tables.hpp"
#include "link/transfer.hpp"
#include "model/catalogue.hpp"
#include "model/config.hpp"
#include "model/lookup_memory.hpp"
#include "model/read_targets.hpp"
#include "model/slot_memory.hpp"
#include "stats/notices.hpp"
#include "stats/statistics.hpp"
#include "stats/trace.hpp"
#include "store/expert_store.hpp"

namespace rotary {

struct paged_model {
    paged_model(ggml_backend_dev_t inner, model_config chosen) :
        inner(inner), config(std::move(chosen)), slots(inner, config.repack), lookup_memory(inner, stats),
        store({ config.name, config.store, config.staging_bytes, slots.inner_is_host() }, notices, stats),
        transfer(inner, config.name, config.pin, store, notices, stats), tables(inner, config.name, stats),
        targets(experts, store, stats) {}

    bool     inner_is_host() const { return slots.inner_is_host(); }
    uint64_t generation() const {
        return slots.generation() + lookup_memory.generation();
    } // changes when slots or ids move

    ggml_backend_dev_t    inner;
    model_config          config;
    statistics            stats;
    rotary::notices       notices;
    routing_trace         trace;
    catalogue             experts;
    slot_memory           slots;
    rotary::lookup_memory lookup_memory;
    expert_store          store;
    rotary::transfer      transfer; // after the store: copies end before the memory that they read is freed
    device_tables         tables;
    read_targets          targets;
    rotary::rebalancer    rebalancer;
};

} // namespace rotary
