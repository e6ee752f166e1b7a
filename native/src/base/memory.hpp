// SPDX-License-Identifier: MIT
//
// Host memory as this process may use it: the machine's, within the limits of its cgroups.

#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace rotary {

// A stretch of memory.
struct memory_range {
    char * begin;
    char * end;
};

struct host_memory {
    uint64_t total;     // bytes: the machine's memory, or the tightest cgroup limit
    uint64_t available; // bytes that can be allocated without swapping, page cache counted as free
};

// /proc and the mounts of cgroups are below `root`. The same figures as rotary_llamacpp/machine.py's.
host_memory host_memory_now(const std::string & root = "");

// Bytes of this process's own memory that it has asked for and not touched yet, such as the buffers of the first graph.
// Large pieces only: threads' stacks are never touched whole. Our own slots are left out.
uint64_t host_memory_promised();

// Slots, of any pool, are touched on purpose or not at all: known as such while the result lives.
std::shared_ptr<void> host_memory_of_slots(const memory_range & range);

// Share of the last ten seconds, in percent, in which something waited for memory: the kernel's pressure stall
// information of this process's cgroup if it has one, else of the machine. 0 where the kernel keeps none.
double host_memory_pressure(const std::string & root = "");

} // namespace rotary
