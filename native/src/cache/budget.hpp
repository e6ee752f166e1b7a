// SPDX-License-Identifier: MIT
//
// Budget: what a text such as "25%" or "8GiB" asks for. Pure logic, no ggml. division.hpp turns a budget into slots.

#pragma once

#include <string>

namespace rotary {

struct budget {
    enum class kind { automatic, minimum, bytes, share, slots, off };

    kind   what  = kind::automatic;
    double value = 0; // bytes, share of all expert bytes (0..1], or slots per layer
};

// Parse "auto", "min", "off", "0", "25%", "0.25" (a share: it has a point and no unit), "8GiB", "1000000", "16 slots".
// False if the text is none of these. rotary_llamacpp/config.py reads the same texts, which a test checks.
bool budget_parse(const std::string & text, budget & out);

// The error message for a text that is refused.
std::string budget_not_understood(const std::string & text);

} // namespace rotary
