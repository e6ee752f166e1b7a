// SPDX-License-Identifier: MIT
//
// CPUs. See cpus.hpp.
// Source: Linux Documentation/scheduler/sched-bwc.rst (version 1) and admin-guide/cgroup-v2.rst.

#include "base/cpus.hpp"

#include "base/cgroup.hpp"

#include <algorithm>
#include <fstream>
#include <sched.h>
#include <thread>

namespace rotary {

uint32_t cpu_quota(const std::string & root) {
    uint64_t n_cpus = UINT32_MAX;
    for (const cgroup & group : own_cgroups("cpu", root)) {
        for (const std::string & dir : group.dirs) {
            uint64_t quota  = UINT64_MAX;
            uint64_t period = 0;
            if (group.is_v2) {
                std::ifstream file(dir + "/cpu.max"); // "max 100000" or "150000 100000"
                std::string   first, second;
                file >> first >> second;
                quota  = number(first, UINT64_MAX);
                period = number(second, 0);
            } else {
                quota  = read_number(dir + "/cpu.cfs_quota_us", UINT64_MAX); // -1: no quota
                period = read_number(dir + "/cpu.cfs_period_us", 0);
            }
            if (quota != UINT64_MAX && period != 0) {
                n_cpus = std::min(n_cpus, quota / period);
            }
        }
    }
    return (uint32_t) n_cpus;
}

uint32_t cpu_count(const std::string & root) {
    cpu_set_t      allowed;
    const bool     known = sched_getaffinity(0, sizeof(allowed), &allowed) == 0; // fails beyond 1024 CPUs
    const uint32_t n     = known ? (uint32_t) CPU_COUNT(&allowed) : std::thread::hardware_concurrency();
    return std::max<uint32_t>(1, std::min(n, cpu_quota(root)));
}

} // namespace rotary
