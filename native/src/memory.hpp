// SPDX-License-Identifier: MIT
//
// Host memory as this process may use it: the machine's, within the limits of its cgroups.

#pragma once

#include <cstdint>

namespace rotary {

struct host_memory {
    uint64_t total;     // bytes: the machine's memory, or the tightest cgroup limit
    uint64_t available; // bytes that can be allocated without swapping, page cache counted as free
};

host_memory host_memory_now();

// Share of the last ten seconds, in percent, in which something waited for memory: the kernel's pressure stall
// information of this process's cgroup if it has one, else of the machine. 0 where the kernel keeps none.
double host_memory_pressure();

} // namespace rotary
