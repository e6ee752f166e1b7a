// SPDX-License-Identifier: MIT
//
// Division of a budget. See division.hpp.

#include "cache/division.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <cmath>

namespace rotary {

uint64_t budget_all_bytes(const std::vector<layer_size> & layers) {
    uint64_t sum = 0;
    for (const auto & layer : layers) {
        sum += layer.expert_bytes * layer.n_expert;
    }
    return sum;
}

uint64_t budget_min_bytes(const std::vector<layer_size> & layers) {
    uint64_t sum = 0;
    for (const auto & layer : layers) {
        sum += layer.expert_bytes * layer.n_expert_used;
    }
    return sum;
}

uint64_t budget_bytes(const budget & b, const std::vector<layer_size> & layers, uint64_t free_bytes) {
    const uint64_t all = budget_all_bytes(layers);
    switch (b.what) {
        case budget::kind::automatic: return std::min(all, free_bytes);
        case budget::kind::minimum: return budget_min_bytes(layers);
        case budget::kind::bytes: return std::min(all, (uint64_t) b.value);
        case budget::kind::share: return std::min(all, (uint64_t) std::llround((double) all * b.value));
        case budget::kind::off: return 0;
        case budget::kind::slots: break;
    }
    uint64_t sum = 0;
    for (const auto & layer : layers) {
        sum += layer.expert_bytes * std::min(layer.n_expert, (int32_t) b.value);
    }
    return sum;
}

std::vector<int32_t> budget_slots(uint64_t bytes, const std::vector<layer_size> & layers) {
    std::vector<int32_t> slots(layers.size());
    uint64_t             used = 0;
    for (size_t i = 0; i < layers.size(); i++) {
        slots[i] = layers[i].n_expert_used;
        used += layers[i].expert_bytes * slots[i];
    }
    if (used > bytes) {
        return {};
    }
    // Raise the lowest layers by one slot a round, until a round adds none: equal shares, and the remainder spread. At
    // most n_expert rounds, so this costs nothing beside the allocation that follows.
    for (bool added = true; added;) {
        added          = false;
        int32_t lowest = INT32_MAX;
        for (size_t i = 0; i < layers.size(); i++) {
            if (slots[i] < layers[i].n_expert && used + layers[i].expert_bytes <= bytes) {
                lowest = std::min(lowest, slots[i]);
            }
        }
        for (size_t i = 0; i < layers.size(); i++) {
            if (slots[i] == lowest && slots[i] < layers[i].n_expert && used + layers[i].expert_bytes <= bytes) {
                slots[i]++;
                used += layers[i].expert_bytes;
                added = true;
            }
        }
    }
    return slots;
}

std::string budget_too_small(const std::string & model, const std::string & text, uint64_t bytes,
                             const std::vector<layer_size> & layers) {
    const uint64_t min_bytes = budget_min_bytes(layers);
    return format("%s: budget %s is %s; one token's experts take %s in %zu layers; use \"min\" or raise the budget to "
                  "%llu MiB",
                  model.c_str(), text.c_str(), mib(bytes).c_str(), mib(min_bytes).c_str(), layers.size(),
                  (unsigned long long) ((min_bytes + 1048575) / 1048576));
}

} // namespace rotary
