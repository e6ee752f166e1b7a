// SPDX-License-Identifier: MIT
//
// Budget: from a text such as "25%" or "8GiB" to a number of slots for each layer. Pure logic, no ggml.

#pragma once

#include "rotary.h"

#include <cstdint>
#include <string>
#include <vector>

namespace rotary {

struct budget {
    enum class kind { automatic, minimum, bytes, share, slots, off };

    kind   what  = kind::automatic;
    double value = 0; // bytes, share of all expert bytes (0..1], or slots per layer
};

// Parse "auto", "min", "off", "0", "25%", "0.25" (a share: it has a point and no unit), "8GiB", "1000000", "16 slots".
// False if the text is none of these. config.py reads the same, which a test holds it to.
bool budget_parse(const std::string & text, budget & out);

using layer_size = rotary_layer_size;

uint64_t budget_all_bytes(const std::vector<layer_size> & layers); // every expert
uint64_t budget_min_bytes(const std::vector<layer_size> & layers); // one token's experts

// Bytes that `b` stands for; `free_bytes` is what "auto" may take.
uint64_t budget_bytes(const budget & b, const std::vector<layer_size> & layers, uint64_t free_bytes);

// Slots for each layer within `bytes`: the same number everywhere, and what is left over one more for as many layers
// as it reaches, the first ones first. Never more than a layer has experts. Empty if even budget_min_bytes() does not
// fit.
std::vector<int32_t> budget_slots(uint64_t bytes, const std::vector<layer_size> & layers);

// The two refusals, in the words of an error message.
std::string budget_not_understood(const std::string & text);
std::string budget_too_small(const std::string & model, const std::string & text, uint64_t bytes,
                             const std::vector<layer_size> & layers);

} // namespace rotary
