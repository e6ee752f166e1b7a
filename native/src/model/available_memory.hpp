// SPDX-License-Identifier: MIT
//
// Available memory: how much of the inner device's memory slots may take, and what has to stay free.

#pragma once

#include "model/paged_model.hpp"

#include <cstdint>

namespace rotary {

// Host memory of so many bytes in all: what always stays free of it.
uint64_t host_margin(uint64_t total);

// What budget "auto" leaves free of the inner device's `total`: for peaks of other programs, and for our own small
// allocations that come later.
uint64_t margin_bytes(const paged_model & model, uint64_t total);

// Memory that slots may take besides what they have.
uint64_t free_bytes(const paged_model & model);

} // namespace rotary
