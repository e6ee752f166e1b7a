// SPDX-License-Identifier: MIT
//
// Linux control groups that this process is in, of either version: where they are mounted. As
// rotary_llamacpp/cgroups.py, which plans by the same groups; tests/test_machine.py holds both to the same trees.
// Threading: none of its own; each call reads /proc anew, for a process may be moved to another group.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rotary {

struct cgroup {
    bool                     is_v2;
    std::vector<std::string> dirs; // of the process's own group, then of those around it, up to the mount point
};

// Groups that may have a controller, "memory" or "cpu". /proc and the mount points are below `root`.
std::vector<cgroup> own_cgroups(const std::string & controller, const std::string & root);

// A whole number that is not negative, else `otherwise`: "max", -1, what is not there.
uint64_t number(const std::string & word, uint64_t otherwise);
uint64_t read_number(const std::string & path, uint64_t otherwise);

} // namespace rotary
