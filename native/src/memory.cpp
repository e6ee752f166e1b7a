// SPDX-License-Identifier: MIT
//
// Host memory from /proc and the cgroup file systems. See memory.hpp.
// Source: Linux Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, proc(5).

#include "memory.hpp"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace rotary {

// First number after `key` in a file of "key number" lines; `otherwise` if there is none.
static uint64_t read_field(const std::string & path, const std::string & key, uint64_t otherwise) {
    std::ifstream file(path);
    std::string   line;
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string        name;
        uint64_t           value;
        if (words >> name >> value && name == key) {
            return value;
        }
    }
    return otherwise;
}

// The single number a cgroup file holds; "max" and absent files are `otherwise`.
static uint64_t read_number(const std::string & path, uint64_t otherwise) {
    std::ifstream file(path);
    uint64_t      value;
    return file >> value ? value : otherwise;
}

// What is left under one cgroup directory. Inactive file pages are reclaimed before the limit bites.
static uint64_t cgroup_left(const std::string & dir, const char * limit, const char * usage, const char * inactive) {
    const uint64_t max = read_number(dir + "/" + limit, UINT64_MAX);
    if (max == UINT64_MAX) {
        return UINT64_MAX;
    }
    const uint64_t used  = read_number(dir + "/" + usage, 0);
    const uint64_t cache = read_field(dir + "/memory.stat", inactive, 0);
    const uint64_t taken = used > cache ? used - cache : 0;
    return max > taken ? max - taken : 0;
}

// The tightest of a cgroup and its ancestors; in a container the path may not exist, then the root is what counts.
static uint64_t cgroup_tree_left(const std::string & root, std::string path, const char * limit, const char * usage,
                                 const char * inactive) {
    uint64_t left = UINT64_MAX;
    while (true) {
        left               = std::min(left, cgroup_left(root + path, limit, usage, inactive));
        const size_t slash = path.rfind('/');
        if (slash == std::string::npos || path == "/") {
            return left;
        }
        path = path.substr(0, slash);
    }
}

uint64_t host_available_bytes() {
    uint64_t left = read_field("/proc/meminfo", "MemAvailable:", UINT64_MAX / 1024) * 1024;

    std::ifstream groups("/proc/self/cgroup"); // lines "id:controllers:path"; v2 has id 0 and no controllers
    std::string   line;
    while (std::getline(groups, line)) {
        const size_t a = line.find(':');
        const size_t b = a == std::string::npos ? a : line.find(':', a + 1);
        if (b == std::string::npos) {
            continue;
        }
        const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",";
        const std::string path        = line.substr(b + 1);
        if (controllers == ",,") {
            left = std::min(left,
                            cgroup_tree_left("/sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file"));
        } else if (controllers.find(",memory,") != std::string::npos) {
            left = std::min(left, cgroup_tree_left("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
                                                   "memory.usage_in_bytes", "total_inactive_file"));
        }
    }
    return left;
}

} // namespace rotary
