// SPDX-License-Identifier: MIT
//
// Device memory: what an inner device with memory of its own needs besides slots: the tier of slots in RAM in front of
// it, and page tables for the layers whose lookups it resolves itself.

#pragma once

#include "model/paged_model.hpp"

namespace rotary {

// Whether the device can read some experts in place, from pinned memory.
bool has_experts_on_device(const paged_model & model);

// Allocate the tier in RAM from the available memory less a margin, pinned if allowed. Without the tier, or where
// experts are not whole sectors, each miss is read from the disk.
void allocate_ram_tier(paged_model & model);

// False if the device has no memory for page tables.
bool allocate_device_tables(paged_model & model, const char * policy);

} // namespace rotary
