// SPDX-License-Identifier: MIT
//
// Host memory that this process may use: the machine's, within the limits of its cgroups.

#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace rotary {

// Addresses [begin, end).
struct memory_range {
    char * begin;
    char * end;
};

struct host_memory {
    uint64_t total;     // bytes: the machine's memory, or the tightest cgroup limit
    uint64_t available; // bytes that can be allocated without swapping, page cache counted as free
};

// The same figures as rotary_llamacpp/host/machine.py. /proc and the mounts of cgroups are below `root`.
host_memory host_memory_now(const std::string & root = "");

// Bytes that this process has allocated and not touched yet, such as the buffers of the first graph. Slots do not
// count, nor do mappings up to a thread stack's size: stacks are never touched whole.
uint64_t host_memory_promised();

// Exclude slots of any pool from host_memory_promised() while the result lives: they are touched on purpose or never.
std::shared_ptr<void> host_memory_of_slots(const memory_range & range);

// Percent of the last ten seconds in which some task waited for memory: the kernel's pressure stall information for
// this process's cgroup if it has any, else for the machine; 0 without it.
double host_memory_pressure(const std::string & root = "");

} // namespace rotary
