// SPDX-License-Identifier: MIT
//
// Budget: what a text such as "25%" or "8GiB" asks for. Pure logic, no ggml. How it becomes slots is division.hpp.

#pragma once

#include <string>

namespace rotary {

struct budget {
    enum class kind { automatic, minimum, bytes, share, slots, off };

    kind   what  = kind::automatic;
    double value = 0; // bytes, share of all expert bytes (0..1], or slots per layer
};

// Parse "auto", "min", "off", "0", "25%", "0.25" (a share: it has a point and no unit), "8GiB", "1000000", "16 slots".
// False if the text is none of these. config.py reads the same, which a test holds it to.
bool budget_parse(const std::string & text, budget & out);

// Why a text is refused, as an error message says it.
std::string budget_not_understood(const std::string & text);

} // namespace rotary
