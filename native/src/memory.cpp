// SPDX-License-Identifier: MIT
//
// Host memory from /proc and the cgroup file systems. See memory.hpp.
// Source: Linux Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, proc(5).

#include "memory.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
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

struct cgroup_files {
    const char * limit;
    const char * usage;
    const char * inactive;
    const char * active;
};

// The single number a cgroup file holds; "max" and absent files are `otherwise`.
static uint64_t read_number(const std::string & path, uint64_t otherwise) {
    std::ifstream file(path);
    uint64_t      value;
    return file >> value ? value : otherwise;
}

// Tighten `memory` to what one cgroup directory allows. File pages are reclaimed before the limit bites.
static void tighten(host_memory & memory, const std::string & dir, const cgroup_files & names) {
    const uint64_t max = read_number(dir + "/" + names.limit, UINT64_MAX);
    if (max >= UINT64_MAX / 4096) {
        return; // v1 writes a huge number for no limit
    }
    const uint64_t used = read_number(dir + "/" + names.usage, 0);
    const uint64_t cache =
        read_field(dir + "/memory.stat", names.inactive, 0) + read_field(dir + "/memory.stat", names.active, 0);
    const uint64_t taken = used > cache ? used - cache : 0;
    memory.total         = std::min(memory.total, max);
    memory.available     = std::min(memory.available, max > taken ? max - taken : 0);
}

// The cgroups that hold this process, from its own up; in a container the path may not exist, then the root counts.
template <typename visitor> static void each_cgroup(const visitor & visit) {
    static const cgroup_files v1 = { "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
                                     "total_active_file" };
    static const cgroup_files v2 = { "memory.max", "memory.current", "inactive_file", "active_file" };

    std::ifstream groups("/proc/self/cgroup"); // lines "id:controllers:path"; v2 has id 0 and no controllers
    std::string   line;
    while (std::getline(groups, line)) {
        const size_t a = line.find(':');
        const size_t b = a == std::string::npos ? a : line.find(':', a + 1);
        if (b == std::string::npos) {
            continue;
        }
        const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",";
        const bool        is_v2       = controllers == ",,";
        if (!is_v2 && controllers.find(",memory,") == std::string::npos) {
            continue;
        }
        std::string path = line.substr(b + 1);
        while (true) {
            visit((is_v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory") + path, is_v2 ? v2 : v1);
            const size_t slash = path.rfind('/');
            if (slash == std::string::npos || path == "/") {
                break;
            }
            path = path.substr(0, slash);
        }
    }
}

host_memory host_memory_now() {
    host_memory memory = { read_field("/proc/meminfo", "MemTotal:", UINT64_MAX / 1024) * 1024,
                           read_field("/proc/meminfo", "MemAvailable:", UINT64_MAX / 1024) * 1024 };
    each_cgroup([&](const std::string & dir, const cgroup_files & names) { tighten(memory, dir, names); });
    return memory;
}

static std::mutex                           slots_mutex;
static std::map<const void *, const void *> slots; // begin, end

std::shared_ptr<void> host_memory_of_slots(const memory_range & range) {
    const std::lock_guard<std::mutex> lock(slots_mutex);
    slots[range.begin] = range.end;
    return { range.begin, [](void * begin) {
                const std::lock_guard<std::mutex> again(slots_mutex);
                slots.erase(begin);
            } };
}

uint64_t host_memory_promised() {
    static constexpr uint64_t stack_kib = 8 << 10; // and its guard page

    std::ifstream smaps("/proc/self/smaps");
    std::string   line;
    uint64_t      begin = 0, end = 0, kib = 0, untouched = 0, promised = 0;
    bool          counts = false;

    const std::lock_guard<std::mutex> lock(slots_mutex);
    while (std::getline(smaps, line)) {
        char     flags[5];
        uint64_t inode;
        if (sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %*x %*s %" SCNu64, &begin, &end, flags, &inode) == 4) {
            const auto inside = [&](const auto & its) {
                return begin < (uint64_t) its.second && end > (uint64_t) its.first;
            };
            counts = flags[1] == 'w' && flags[3] == 'p' && inode == 0 && (end - begin) / 1024 > stack_kib + 4 &&
                     std::none_of(slots.begin(), slots.end(), inside);
        } else if (counts && sscanf(line.c_str(), "Rss: %" SCNu64, &kib) == 1) {
            untouched = end - begin > kib * 1024 ? end - begin - kib * 1024 : 0;
            promised += untouched;
        } else if (counts && line.compare(0, 8, "VmFlags:") == 0 && line.find(" nr") != std::string::npos) {
            promised -= untouched; // reserved addresses, of sanitizers and JITs: terabytes that are never taken
        }
    }
    return promised;
}

// "some avg10=1.23 avg60=..." -> 1.23; negative if there is no such file.
static double some_avg10(const std::string & path) {
    std::ifstream file(path);
    std::string   word;
    while (file >> word) {
        if (word.compare(0, 6, "avg10=") == 0) {
            return strtod(word.c_str() + 6, nullptr);
        }
    }
    return -1.0;
}

double host_memory_pressure() {
    double found = -1.0;
    each_cgroup([&](const std::string & dir, const cgroup_files &) {
        found = found < 0.0 ? some_avg10(dir + "/memory.pressure") : found;
    });
    return std::max(found < 0.0 ? some_avg10("/proc/pressure/memory") : found, 0.0);
}

} // namespace rotary
