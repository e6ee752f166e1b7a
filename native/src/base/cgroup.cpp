// SPDX-License-Identifier: MIT
//
// Control groups. See cgroup.hpp.
// Source: cgroups(7), cgroup_namespaces(7), proc_pid_mountinfo(5).

#include "base/cgroup.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <sstream>

namespace rotary {

static std::vector<std::string> split(const std::string & text, char by) {
    std::vector<std::string> parts;
    std::istringstream       stream(text);
    std::string              part;
    part.reserve(text.size()); // see read_lines()
    while (std::getline(stream, part, by)) {
        if (!part.empty()) {
            parts.push_back(part);
        }
    }
    return parts;
}

static bool contains(const std::string & list, const std::string & name) {
    const std::vector<std::string> names = split(list, ',');
    return std::find(names.begin(), names.end(), name) != names.end();
}

struct cgroup_mount {
    bool        is_v2;
    std::string top; // directory of the hierarchy that is mounted at `point`
    std::string point;
};

// mountinfo writes blanks and other special characters in octal: "\040".
static std::string unescaped(const std::string & text) {
    std::string plain;
    for (size_t i = 0; i < text.size(); i++) {
        const std::string digits = text.substr(i + 1, 3);
        if (text[i] == '\\' && digits.size() == 3 && digits.find_first_not_of("01234567") == std::string::npos) {
            plain += (char) std::strtol(digits.c_str(), nullptr, 8);
            i += 3;
        } else {
            plain += text[i];
        }
    }
    return plain;
}

// Mounts of hierarchies that may have the controller; the usual places if mountinfo cannot be read.
static std::vector<cgroup_mount> read_mounts(const std::string & controller, const std::string & root) {
    std::vector<cgroup_mount> found;
    bool                      is_read = false;
    read_lines(root + "/proc/self/mountinfo", [&](const std::string & line) {
        is_read           = true;
        const size_t left = line.find(" - "); // the number of fields before it varies
        if (left == std::string::npos || line.compare(left + 3, 6, "cgroup") != 0) {
            return;
        }
        const auto own    = split(line.substr(0, left), ' ');
        const auto fields = split(line.substr(left + 3), ' ');
        const bool is_v2  = !fields.empty() && fields[0] == "cgroup2";
        if (own.size() > 4 &&
            (is_v2 || (!fields.empty() && fields[0] == "cgroup" && contains(fields.back(), controller)))) {
            found.push_back({ is_v2, unescaped(own[3]), unescaped(own[4]) });
        }
    });
    if (!is_read) {
        found = { { false, "/", "/sys/fs/cgroup/" + controller }, { true, "/", "/sys/fs/cgroup" } };
    }
    return found;
}

// Sets `names` to the directories from `top` to `path`; false if `path` is elsewhere, or outside the namespace ("..").
static bool path_below(const std::string & path, const std::string & top, std::vector<std::string> & names) {
    names                                = split(path, '/');
    const std::vector<std::string> above = split(top, '/');
    if (above.size() > names.size() || !std::equal(above.begin(), above.end(), names.begin())) {
        return false;
    }
    names.erase(names.begin(), names.begin() + above.size());
    return std::find(names.begin(), names.end(), "..") == names.end();
}

std::vector<cgroup> own_cgroups(const std::string & controller, const std::string & root) {
    std::vector<cgroup>             found;
    const std::vector<cgroup_mount> mounts = read_mounts(controller, root);

    // Lines "id:controllers:path"; version 2 has id 0 and no controllers.
    read_lines(root + "/proc/self/cgroup", [&](const std::string & line) {
        const size_t a = line.find(':');
        const size_t b = a == std::string::npos ? a : line.find(':', a + 1); // the path may have colons
        if (b == std::string::npos || b + 1 == line.size()) {
            return;
        }
        const std::string controllers = line.substr(a + 1, b - a - 1);
        const std::string path        = line.substr(b + 1);
        const bool        is_v2       = controllers.empty();
        if (!is_v2 && !contains(controllers, controller)) {
            return;
        }
        // In a container, the path may be below no mount; then each mount point counts as the process's group.
        std::vector<std::string> names;
        const bool               fits = std::any_of(mounts.begin(), mounts.end(), [&](const auto & mount) {
            return mount.is_v2 == is_v2 && path_below(path, mount.top, names);
        });
        for (const cgroup_mount & mount : mounts) {
            if (mount.is_v2 != is_v2 || (fits && !path_below(path, mount.top, names))) {
                continue;
            }
            std::string dir  = root + mount.point;
            cgroup      each = { is_v2, { dir } };
            for (size_t i = 0; fits && i < names.size(); i++) {
                dir += "/" + names[i];
                each.dirs.insert(each.dirs.begin(), dir);
            }
            found.push_back(each);
        }
    });
    return found;
}

uint64_t number(const std::string & word, uint64_t otherwise) {
    if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos) {
        return otherwise;
    }
    errno                = 0;
    const uint64_t value = std::strtoull(word.c_str(), nullptr, 10);
    return errno == 0 ? value : otherwise;
}

uint64_t read_number(const std::string & path, uint64_t otherwise) {
    std::ifstream file(path);
    std::string   word;
    word.reserve(64); // see read_lines()
    return file >> word ? number(word, otherwise) : otherwise;
}

} // namespace rotary
