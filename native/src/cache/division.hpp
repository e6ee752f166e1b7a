// SPDX-License-Identifier: MIT
//
// Division: from a budget to a number of slots for each layer. Pure logic, no ggml.

#pragma once

#include "cache/budget.hpp"
#include "rotary.h"

#include <cstdint>
#include <string>
#include <vector>

namespace rotary {

using layer_size = rotary_layer_size;

uint64_t budget_all_bytes(const std::vector<layer_size> & layers); // every expert
uint64_t budget_min_bytes(const std::vector<layer_size> & layers); // one token's experts

// Bytes that `b` stands for; `free_bytes` is what "auto" may take.
uint64_t budget_bytes(const budget & b, const std::vector<layer_size> & layers, uint64_t free_bytes);

// Slots for each layer within `bytes`: equal shares, at least n_expert_used and at most n_expert, and the remainder one
// slot a layer, first layers first. Empty if budget_min_bytes() does not fit.
std::vector<int32_t> budget_slots(uint64_t bytes, const std::vector<layer_size> & layers);

// The error message for a budget that is refused.
std::string budget_too_small(const std::string & model, const std::string & text, uint64_t bytes,
                             const std::vector<layer_size> & layers);

} // namespace rotary
