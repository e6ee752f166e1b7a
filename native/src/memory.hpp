// SPDX-License-Identifier: MIT
//
// How much host memory this process may still take: free memory, cgroup limits included.

#pragma once

#include <cstdint>

namespace rotary {

// Bytes that can be allocated without pushing the machine or any enclosing memory cgroup (v1 or v2) over its limit;
// page cache counts as available. UINT64_MAX where the system does not tell.
uint64_t host_available_bytes();

} // namespace rotary
