// SPDX-License-Identifier: MIT
//
// Finds the Linux control groups of this process, version 1 and 2. rotary_llamacpp/host/cgroups.py does the same for
// planning; tests/unit/test_machine.py checks both against the same trees.
// Threading: any thread. Each call reads /proc anew, because the process may be moved to another group.

#pragma once

#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace rotary {

struct cgroup {
    bool                     is_v2;
    std::vector<std::string> dirs; // the process's own group first, then its ancestors up to the mount point
};

// The process's groups that may have `controller`, "memory" or "cpu". /proc and the mount points are below `root`.
std::vector<cgroup> own_cgroups(const std::string & controller, const std::string & root);

// A whole number that is not negative; `otherwise` for anything else, such as "max", "-1" or a file that is missing.
uint64_t number(const std::string & word, uint64_t otherwise);
uint64_t read_number(const std::string & path, uint64_t otherwise);

// Call `take` with each line of a file; not at all if it cannot be read.
template <typename function> void read_lines(const std::string & path, const function & take) {
    std::ifstream file(path);
    std::string   line;
    line.reserve(4096); // getline() takes a failed allocation for the end of the file: allocate here
    while (std::getline(file, line)) {
        take(line);
    }
}

} // namespace rotary
