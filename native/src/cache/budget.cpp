// SPDX-License-Identifier: MIT
//
// Budget as text. See budget.hpp.

#include "cache/budget.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>

namespace rotary {

// Spaces, letters and numbers as in the C locale: an application may set the user's, where a number may have a comma.
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

// Digits with at most one point. False if there are no digits, or the number does not fit into a double.
static bool parse_number(const std::string & digits, double & out) {
    if (digits.find_first_of("0123456789") == std::string::npos || digits.find('.') != digits.rfind('.')) {
        return false;
    }
    std::istringstream in(digits);
    in.exceptions(std::ios::badbit); // a failed allocation is not a mistake in the text
    in.imbue(std::locale::classic());
    return static_cast<bool>(in >> out) && std::isfinite(out);
}

// Binary multiples for KiB and for the bare letters people type (8G), decimal ones for KB, as on disks; 0 if not known.
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

} // namespace rotary
