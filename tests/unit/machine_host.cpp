// SPDX-License-Identifier: MIT
//
// C functions over native/src/base/memory.hpp and cpus.hpp: the memory and CPUs that a process may use.

#include "base/cpus.hpp"
#include "base/memory.hpp"

extern "C" {

void machine_memory(const char * root, uint64_t * total, uint64_t * available) {
    const rotary::host_memory found = rotary::host_memory_now(root);
    *total                          = found.total;
    *available                      = found.available;
}

uint32_t machine_cpu_quota(const char * root) {
    return rotary::cpu_quota(root);
}

uint32_t machine_cpu_count(const char * root) {
    return rotary::cpu_count(root);
}

double machine_memory_pressure(const char * root) {
    return rotary::host_memory_pressure(root);
}
}
