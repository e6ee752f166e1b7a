// SPDX-License-Identifier: MIT
//
// C API: slot tables, caches of all layers and budgets without a pool, for tests and simulators. See rotary.h.

#include "rotary.h"

#include "base/error.hpp"
#include "cache/budget.hpp"
#include "cache/division.hpp"
#include "cache/rebalancer.hpp"
#include "cache/slot_table.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

struct rotary_slots : rotary::slot_table {
    using slot_table::slot_table;
};

struct rotary_cache {
    std::vector<std::unique_ptr<rotary_slots>> layers;
    rotary::rebalancer                         rebalancer;
    int32_t                                    last = -1; // the layer resolved last

    // Call between two tokens.
    void rebalance() {
        rotary::rebalancer::step step;
        if (!rebalancer.propose(step) || !layers[step.from]->reserved().empty()) {
            return;
        }
        for (int32_t i = 0; i < step.n; i++) {
            layers[step.from]->shrink();
        }
        layers[step.to]->resize(layers[step.to]->n_slots() + 1);
        rebalancer.commit(step);
    }
};

rotary_slots * rotary_slots_new(int32_t n_expert, int32_t n_slots) try {
    if (n_expert < 1 || n_slots < 1 || n_slots > n_expert) {
        return nullptr;
    }
    return new rotary_slots(n_expert, n_slots, rotary::lru_new({ n_expert, n_slots, 0, 0, {}, nullptr }));
} catch (...) {
    rotary::fail_by_exception();
    return nullptr;
}

void rotary_slots_free(rotary_slots * slots) {
    delete slots;
}

int32_t rotary_slots_resolve(rotary_slots * slots, const int32_t * ids, int32_t n_ids, int32_t * slot_ids,
                             rotary_load * loads) try {
    return slots->resolve(ids, nullptr, n_ids, 1, slot_ids, loads);
} catch (...) {
    return rotary::fail_by_exception();
}

int32_t rotary_slots_slot_of(const rotary_slots * slots, int32_t expert) {
    return expert < 0 || expert >= slots->n_expert() ? -1 : slots->slot_of(expert);
}

int32_t rotary_slots_expert_of(const rotary_slots * slots, int32_t slot) {
    return slot < 0 || slot >= slots->n_slots() ? -1 : slots->expert_of(slot);
}

int32_t rotary_slots_n_slots(const rotary_slots * slots) {
    return slots->n_slots();
}

int32_t rotary_slots_n_resident(const rotary_slots * slots) {
    return slots->n_resident();
}

void rotary_slots_clear(rotary_slots * slots) try { slots->clear(); } catch (...) {
    rotary::fail_by_exception();
}

int32_t rotary_slots_reserve(rotary_slots * slots, int32_t expert, const int32_t * keep, int32_t n_keep) try {
    const auto known = [&](int32_t each) {
        return each >= 0 && each < slots->n_expert();
    };
    if (!known(expert) || slots->slot_of(expert) >= 0 || slots->reserved_for(expert) >= 0 ||
        !std::all_of(keep, keep + n_keep, known)) {
        return ROTARY_ERR_ARG;
    }
    const int32_t slot = slots->reserve(expert, { keep, keep + n_keep });
    return slot >= 0 ? slot : ROTARY_ERR_BUDGET;
} catch (...) {
    return rotary::fail_by_exception();
}

int32_t rotary_slots_end_reservation(rotary_slots * slots, int32_t expert, bool resident) try {
    if (slots->reserved_for(expert) < 0) {
        return ROTARY_ERR_ARG;
    }
    slots->end_reservation(expert, resident);
    return ROTARY_OK;
} catch (...) {
    return rotary::fail_by_exception();
}

const char * rotary_policy_names(void) {
    return rotary::guarded("", rotary::policy_names);
}

rotary_cache * rotary_cache_new(const char * policy, const rotary_policy * own, int32_t n_layers, int32_t n_expert,
                                const int32_t * n_slots, int32_t adaptive, int32_t min_slots) try {
    auto       cache   = std::make_unique<rotary_cache>();
    const auto history = rotary::routing_history_new(n_layers);

    std::vector<rotary::rebalancer::layer_slots> sizes;
    for (int32_t layer = 0; layer < n_layers; layer++) {
        if (n_expert < 1 || n_slots[layer] < 1 || n_slots[layer] > n_expert) {
            rotary::fail(ROTARY_ERR_ARG, rotary::format("cache: layer %d has %d slots for %d experts; 1 to as many as "
                                                        "there are; correct it",
                                                        layer, n_slots[layer], n_expert));
            return nullptr;
        }
        const bool automatic = strcmp(policy, rotary::automatic_policy) == 0;
        auto       chosen    = rotary::policy_new(automatic ? rotary::best_policy : policy,
                                                  { n_expert, n_slots[layer], layer, layer, history, own });
        if (!chosen) {
            rotary::fail(ROTARY_ERR_ARG, rotary::policy_not_known(policy));
            return nullptr;
        }
        cache->layers.push_back(std::make_unique<rotary_slots>(n_expert, n_slots[layer], std::move(chosen)));
        sizes.push_back(
            { n_expert, n_slots[layer], min_slots, rotary::rebalancer::max_slots(n_slots[layer], n_expert), 1 });
    }
    cache->rebalancer = adaptive ? rotary::rebalancer(sizes) : rotary::rebalancer();
    return cache.release();
} catch (...) {
    rotary::fail_by_exception();
    return nullptr;
}

void rotary_cache_free(rotary_cache * cache) {
    delete cache;
}

int32_t rotary_cache_resolve(rotary_cache * cache, int32_t layer, const int32_t * ids, const float * weights,
                             int32_t n_used, int32_t n_tokens, int32_t * slot_ids, rotary_load * loads) try {
    rotary_slots * slots = rotary_cache_layer(cache, layer);
    if (slots == nullptr) {
        return ROTARY_ERR_ARG;
    }
    if (layer < cache->last) {
        cache->rebalance();
    }
    cache->last     = layer;
    const int32_t n = slots->resolve(ids, weights, n_used, n_tokens, slot_ids, loads);
    if (n >= 0) {
        cache->rebalancer.note(layer, ids, n_used, n_tokens);
    }
    return n;
} catch (...) {
    return rotary::fail_by_exception();
}

int32_t rotary_cache_replay(rotary_cache * cache, int64_t n_rows, const int32_t * layers, const int32_t * ids,
                            const float * weights, int32_t n_used, int32_t * misses) try {
    std::vector<int32_t> slot_ids(n_used);
    for (int64_t i = 0; i < n_rows; i++) {
        const int32_t *          row = ids + i * n_used;
        const auto               n   = (int32_t) (std::find(row, row + n_used, -1) - row);
        std::vector<rotary_load> loads(n_used);
        misses[i] = rotary_cache_resolve(cache, layers[i], row, weights != nullptr ? weights + i * n_used : nullptr, n,
                                         1, slot_ids.data(), loads.data());
        if (misses[i] < 0) {
            return misses[i];
        }
    }
    return ROTARY_OK;
} catch (...) {
    return rotary::fail_by_exception();
}

rotary_slots * rotary_cache_layer(rotary_cache * cache, int32_t layer) {
    return layer < 0 || layer >= (int32_t) cache->layers.size() ? nullptr : cache->layers[layer].get();
}

// ---- budget

int32_t rotary_budget_divide(const char * budget, const rotary_layer_size * layers, int32_t n_layers,
                             uint64_t free_bytes, int32_t * n_slots, uint64_t * bytes) try {
    using namespace rotary;
    for (int32_t i = 0; i < n_layers; i++) {
        if (layers[i].n_expert_used < 1 || layers[i].n_expert_used > layers[i].n_expert) {
            return fail(ROTARY_ERR_ARG,
                        format("layer %d: %d experts used per token of %d; between 1 and all; correct them", i,
                               layers[i].n_expert_used, layers[i].n_expert));
        }
    }
    rotary::budget parsed;
    if (n_layers < 0 || budget == nullptr || !budget_parse(budget, parsed) ||
        parsed.what == rotary::budget::kind::off) {
        return fail(ROTARY_ERR_ARG, budget_not_understood(budget != nullptr ? budget : ""));
    }
    const std::vector<layer_size> sizes(layers, layers + n_layers);
    *bytes                           = budget_bytes(parsed, sizes, free_bytes);
    const std::vector<int32_t> slots = budget_slots(*bytes, sizes);
    if (slots.empty() && n_layers > 0) {
        const uint64_t wanted = *bytes;
        *bytes                = budget_min_bytes(sizes);
        return fail(ROTARY_ERR_BUDGET, budget_too_small("model", budget, wanted, sizes));
    }
    std::copy(slots.begin(), slots.end(), n_slots);
    return ROTARY_OK;
} catch (...) {
    return rotary::fail_by_exception();
}
