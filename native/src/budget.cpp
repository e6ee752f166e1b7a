// SPDX-License-Identifier: MIT
//
// Budget text and its division into slots. See budget.hpp.

#include "budget.hpp"

#include "error.hpp"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>

namespace rotary {

// Numbers and small letters as C has them: a program with windows sets the user's language, whose numbers may have a
// comma and whose letters may be others.
static bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static std::string trimmed(const std::string & text) {
    size_t first = 0;
    size_t last  = text.size();
    while (first < last && is_space(text[first])) {
        first++;
    }
    while (last > first && is_space(text[last - 1])) {
        last--;
    }
    std::string out = text.substr(first, last - first);
    for (char & c : out) {
        c = c >= 'A' && c <= 'Z' ? (char) (c - 'A' + 'a') : c;
    }
    return out;
}

// Digits with at most one point among them. False for none, and for more than a double holds.
static bool parse_number(const std::string & digits, double & out) {
    if (digits.find_first_of("0123456789") == std::string::npos || digits.find('.') != digits.rfind('.')) {
        return false;
    }
    std::istringstream in(digits);
    in.exceptions(std::ios::badbit); // a shortage of memory is no mistake in the text
    in.imbue(std::locale::classic());
    return static_cast<bool>(in >> out) && std::isfinite(out);
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
    const std::string s = trimmed(text);
    if (s == "auto") {
        out = { budget::kind::automatic, 0 };
        return true;
    }
    if (s == "min") {
        out = { budget::kind::minimum, 0 };
        return true;
    }
    if (s == "off" || s == "none") {
        out = { budget::kind::off, 0 };
        return true;
    }
    const size_t      n_digits = std::min(s.find_first_not_of("0123456789."), s.size());
    const std::string number   = s.substr(0, n_digits);
    const std::string unit     = trimmed(s.substr(n_digits));
    double            value    = 0;
    if (!parse_number(number, value)) {
        return false;
    }
    const bool is_share = unit == "%" || (unit.empty() && number.find('.') != std::string::npos);
    const bool is_slots = unit == "slots" || unit == "slot";
    if (!is_share && !is_slots && unit_bytes(unit) == 0) {
        return false;
    }
    if (value == 0) {
        out = { budget::kind::off, 0 };
        return true;
    }
    if (is_share) {
        out = { budget::kind::share, unit == "%" ? value / 100 : value };
        return out.value <= 1;
    }
    if (is_slots) {
        out = { budget::kind::slots, value };
        return value == std::floor(value) && value <= INT32_MAX;
    }
    out = { budget::kind::bytes, value * unit_bytes(unit) };
    return out.value >= 1 && out.value < 1e18;
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
    budget parsed;
    if (budget_parse(text, parsed) && parsed.what == budget::kind::off) {
        return format("budget %s: turns paging off; slots take memory; give min or more", text.c_str());
    }
    return format(
        "budget %s: not understood; accepted are auto, min, a share (25%% or 0.25), a size (8GiB), bytes or slots "
        "per layer (16 slots); correct the budget",
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
