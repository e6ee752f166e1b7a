// SPDX-License-Identifier: MIT
//
// Budget text and its division into slots. See budget.hpp.

#include "budget.hpp"

#include "error.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>

namespace rotary {

static std::string normalize(const std::string & text) {
    std::string out;
    for (const char c : text) {
        if (!std::isspace((unsigned char) c)) {
            out += (char) std::tolower((unsigned char) c);
        }
    }
    return out;
}

// Binary multiples for KiB.. and for the bare letters people type (8G), decimal ones for KB.. as on disks.
static double unit_bytes(const std::string & unit) {
    static const char letters[] = "kmgt";
    if (unit.empty() || unit == "b") {
        return 1;
    }
    for (int i = 0; i < 4; i++) {
        const std::string letter(1, letters[i]);
        if (unit == letter || unit == letter + "ib") {
            return std::pow(1024.0, i + 1);
        }
        if (unit == letter + "b") {
            return std::pow(1000.0, i + 1);
        }
    }
    return 0;
}

bool budget_parse(const std::string & text, budget & out) {
    const std::string s = normalize(text);
    if (s == "auto") {
        out = { budget::kind::automatic, 0 };
        return true;
    }
    if (s == "min") {
        out = { budget::kind::minimum, 0 };
        return true;
    }
    if (s == "off") {
        out = { budget::kind::off, 0 };
        return true;
    }
    const size_t      n_digits = std::min(s.find_first_not_of("0123456789."), s.size());
    const std::string number   = s.substr(0, n_digits);
    const std::string unit     = s.substr(n_digits);
    char *            end      = nullptr;
    const double      value    = std::strtod(number.c_str(), &end);
    if (number.empty() || *end != '\0' || !std::isfinite(value)) {
        return false;
    }
    if (unit == "%") {
        out = { value == 0 ? budget::kind::off : budget::kind::share, value / 100 };
        return value <= 100;
    }
    if (unit == "slots" || unit == "slot") {
        out = { value == 0 ? budget::kind::off : budget::kind::slots, value };
        return value == std::floor(value) && value <= INT32_MAX;
    }
    const double factor = unit_bytes(unit);
    out                 = { value == 0 ? budget::kind::off : budget::kind::bytes, value * factor };
    return factor > 0 && out.value < 1e18;
}

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
    // Raise the lowest layers first, one slot a round, until a round adds none: equal shares, and the remainder spread.
    // Rounds are at most the largest n_expert, so this costs nothing beside the allocation that follows.
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

std::string budget_not_understood(const std::string & text) {
    return format(
        "budget %s: not understood; accepted are auto, min, a share (25%%), a size (8GiB), bytes or slots per "
        "layer (16 slots); correct the budget",
        text.c_str());
}

std::string budget_too_small(const std::string & model, const std::string & text, uint64_t bytes,
                             const std::vector<layer_size> & layers) {
    const uint64_t least = budget_min_bytes(layers);
    return format("%s: budget %s is %s; one token's experts take %s in %zu layers; use \"min\" or raise the budget to "
                  "%llu MiB",
                  model.c_str(), text.c_str(), mib(bytes).c_str(), mib(least).c_str(), layers.size(),
                  (unsigned long long) ((least + 1048575) / 1048576));
}

} // namespace rotary

// C API

int32_t rotary_budget_divide(const char * budget, const rotary_layer_size * layers, int32_t n_layers,
                             uint64_t free_bytes, int32_t * n_slots, uint64_t * bytes) {
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
}
