// SPDX-License-Identifier: MIT
//
// Available memory: how much of the inner device's memory slots may take, and how much must stay free.

#pragma once

#include "model/paged_model.hpp"

#include <cstdint>

namespace rotary {

// Bytes that always stay free of a host memory of `total` bytes.
uint64_t host_margin(uint64_t total);

// Bytes that budget "auto" leaves free of the inner device's `total`, for peaks of other programs and for our own small
// allocations that come later.
uint64_t margin_bytes(const paged_model & model, uint64_t total);

// Bytes that slots may take in addition to what they have.
uint64_t free_bytes(const paged_model & model);

} // namespace rotary
