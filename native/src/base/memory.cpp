// SPDX-License-Identifier: MIT
//
// Host memory from /proc and the cgroup file systems. See memory.hpp.
// Source: Linux Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, proc(5).

#include "base/memory.hpp"

#include "base/cgroup.hpp"
#include "base/fork.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <string>

namespace rotary {

// Reads a file of lines "name number".
static std::map<std::string, uint64_t> read_fields(const std::string & path) {
    std::map<std::string, uint64_t> found;
    read_lines(path, [&](const std::string & line) {
        const size_t name  = line.find_first_of(" \t");
        const size_t first = line.find_first_not_of(" \t", name);
        if (name != 0 && first != std::string::npos) {
            const std::string word = line.substr(first, line.find_first_of(" \t", first) - first);
            if (const uint64_t value = number(word, UINT64_MAX); value != UINT64_MAX) {
                found[line.substr(0, name)] = value;
            }
        }
    });
    return found;
}

static uint64_t value_of(const std::map<std::string, uint64_t> & fields, const char * name, uint64_t otherwise) {
    const auto found = fields.find(name);
    return found == fields.end() ? otherwise : found->second;
}

// Tighten `memory` to what one group allows, as _memory() of rotary_llamacpp/host/machine.py does. Reading memory.stat
// makes the kernel sum it up, so it is read only where needed.
static void tighten(host_memory & memory, uint64_t installed, const std::string & dir, bool is_v2, bool is_own) {
    std::map<std::string, uint64_t> stat;
    uint64_t                        max = UINT64_MAX;
    if (is_v2) {
        // Above memory.high, processes are throttled until they hardly run.
        max = std::min(read_number(dir + "/memory.max", UINT64_MAX), read_number(dir + "/memory.high", UINT64_MAX));
    } else {
        max = read_number(dir + "/memory.limit_in_bytes", UINT64_MAX);
        if (is_own) { // includes limits of ancestors that a container does not see
            stat = read_fields(dir + "/memory.stat");
            max  = std::min(max, value_of(stat, "hierarchical_memory_limit", UINT64_MAX));
        }
    }
    if (max >= installed) {
        return; // no limit; version 1 then shows a huge number
    }
    if (stat.empty()) {
        stat = read_fields(dir + "/memory.stat");
    }
    // File pages do not count as taken: they are reclaimed before the limit takes effect.
    const std::string prefix = is_v2 ? "" : "total_";
    const uint64_t    used   = read_number(dir + (is_v2 ? "/memory.current" : "/memory.usage_in_bytes"), 0);
    const uint64_t    cache =
        value_of(stat, (prefix + "inactive_file").c_str(), 0) + value_of(stat, (prefix + "active_file").c_str(), 0);
    const uint64_t taken = used > cache ? used - cache : 0;
    memory.total         = std::min(memory.total, max);
    memory.available     = std::min(memory.available, max > taken ? max - taken : 0);
}

host_memory host_memory_now(const std::string & root) {
    const auto     meminfo   = read_fields(root + "/proc/meminfo");
    const uint64_t installed = value_of(meminfo, "MemTotal:", UINT64_MAX / 1024) * 1024;
    host_memory    memory    = { installed, value_of(meminfo, "MemAvailable:", UINT64_MAX / 1024) * 1024 };
    for (const cgroup & group : own_cgroups("memory", root)) {
        for (const std::string & dir : group.dirs) {
            const bool is_own = dir == group.dirs[0];
            if (!is_own && read_number(dir + "/memory.use_hierarchy", 1) == 0) {
                break; // version 1: this group and its ancestors are not charged for the groups inside
            }
            tighten(memory, installed, dir, group.is_v2, is_own);
        }
    }
    return memory;
}

static auto & slots_mutex = *new fork_mutex; // neither is destroyed: models may outlive our statics
static auto & slots       = *new std::map<const void *, const void *>; // begin, end

std::shared_ptr<void> host_memory_of_slots(const memory_range & range) {
    // Before the mutex is taken: if there is no memory for the pointer, its deleter runs at once, and takes the mutex.
    const std::shared_ptr<void>       known(range.begin, [](void * begin) {
        const std::lock_guard<std::mutex> lock(slots_mutex);
        slots.erase(begin);
    });
    const std::lock_guard<std::mutex> lock(slots_mutex);
    slots[range.begin] = range.end;
    return known;
}

uint64_t host_memory_promised() {
    static constexpr uint64_t stack_kib = 8 << 10; // a thread's usual stack; its guard page is added below

    uint64_t begin = 0, end = 0, kib = 0, untouched = 0, promised = 0;
    bool     counts = false;

    const std::lock_guard<std::mutex> lock(slots_mutex);
    read_lines("/proc/self/smaps", [&](const std::string & line) {
        char     flags[5];
        uint64_t inode;
        if (sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %*x %*s %" SCNu64, &begin, &end, flags, &inode) == 4) {
            const auto inside = [&](const auto & range) {
                return begin < (uint64_t) range.second && end > (uint64_t) range.first;
            };
            counts = flags[1] == 'w' && flags[3] == 'p' && inode == 0 && (end - begin) / 1024 > stack_kib + 4 &&
                     std::none_of(slots.begin(), slots.end(), inside);
        } else if (counts && sscanf(line.c_str(), "Rss: %" SCNu64, &kib) == 1) {
            untouched = end - begin > kib * 1024 ? end - begin - kib * 1024 : 0;
            promised += untouched;
        } else if (counts && line.compare(0, 8, "VmFlags:") == 0 && line.find(" nr") != std::string::npos) {
            promised -= untouched; // MAP_NORESERVE: terabytes of addresses that sanitizers and JITs never use
        }
    });
    return promised;
}

// "some avg10=1.23 avg60=..." -> 1.23; negative if there is no such file.
static double some_avg10(const std::string & path) {
    std::ifstream file(path);
    std::string   word;
    word.reserve(4096); // see read_lines()
    while (file >> word) {
        if (word.compare(0, 6, "avg10=") == 0) {
            return strtod(word.c_str() + 6, nullptr);
        }
    }
    return -1.0;
}

double host_memory_pressure(const std::string & root) {
    double found = -1.0;
    for (const cgroup & group : own_cgroups("memory", root)) {
        for (const std::string & dir : group.dirs) {
            found = found < 0.0 ? some_avg10(dir + "/memory.pressure") : found;
        }
    }
    return std::max(found < 0.0 ? some_avg10(root + "/proc/pressure/memory") : found, 0.0);
}

} // namespace rotary
