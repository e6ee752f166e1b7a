// SPDX-License-Identifier: MIT
//
// Device memory: what an inner device with memory of its own has besides slots: the tier of slots in RAM in front of them,
// and page tables for the layers whose lookups it resolves itself.

#pragma once

#include "model/paged_model.hpp"

namespace rotary {

// Whether the device can read some experts where they lie.
bool has_experts_on_device(const paged_model & model);

// The tier in RAM, of what is available less a margin, pinned if that may be. Without it, or where experts are no whole
// sectors, each miss is read from the disk.
void allocate_ram_tier(paged_model & model);

// False if the device has no memory for page tables.
bool allocate_device_tables(paged_model & model, const char * policy);

} // namespace rotary
