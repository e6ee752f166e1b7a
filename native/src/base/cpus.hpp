// SPDX-License-Identifier: MIT
//
// Counts the CPUs that this process may keep busy, in the same way as rotary_llamacpp/host/machine.py.

#pragma once

#include <cstdint>
#include <string>

namespace rotary {

// CPUs that the process may run on, within its cgroups' quotas; at least 1. /proc and cgroup mounts are below `root`.
uint32_t cpu_count(const std::string & root = "");

// Whole CPUs of the tightest quota, UINT32_MAX without one.
uint32_t cpu_quota(const std::string & root = "");

} // namespace rotary
