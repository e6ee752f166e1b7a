// SPDX-License-Identifier: MIT
//
// CPUs that this process may keep busy. rotary_llamacpp/machine.py counts them in the same way.

#pragma once

#include <cstdint>
#include <string>

namespace rotary {

// CPUs that the process may run on, limited by the quotas of its cgroups; at least 1. /proc is below `root`.
uint32_t cpu_count(const std::string & root = "");

// Whole CPUs of the tightest quota, UINT32_MAX without one.
uint32_t cpu_quota(const std::string & root = "");

} // namespace rotary
