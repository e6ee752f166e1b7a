// SPDX-License-Identifier: MIT
//
// Eviction policies by name. See policy.hpp.

#include "cache/policies/policy.hpp"

#include <algorithm>

namespace rotary {

struct known_policy {
    const char * name;
    std::unique_ptr<policy> (*make)(const policy_setting & setting);
};

static const known_policy known[] = {
    { "lru", lru_new },       { "lfu", lfu_new }, { "weighted", weighted_new }, { "sieve", sieve_new },
    { "s3fifo", s3fifo_new }, { "arc", arc_new }, { "recall", recall_new },
};

std::unique_ptr<policy> policy_new(const std::string & name, const policy_setting & setting) {
    if (setting.own != nullptr) {
        return own_new(setting);
    }
    for (const known_policy & each : known) {
        if (name == each.name) {
            return each.make(setting);
        }
    }
    return nullptr;
}

const char * policy_names() {
    static const std::string names = [] {
        std::string all;
        for (const known_policy & each : known) {
            all += (all.empty() ? "" : ",") + std::string(each.name);
        }
        return all;
    }();
    return names.c_str();
}

const char * policy_name_of(const std::string & name) {
    const auto it =
        std::find_if(std::begin(known), std::end(known), [&](const auto & each) { return name == each.name; });
    return it != std::end(known) ? it->name : "";
}

bool policy_known(const std::string & name) {
    return name == automatic_policy || *policy_name_of(name) != 0;
}

std::string policy_not_known(const std::string & name) {
    return "policy " + name + ": not known; " + automatic_policy + "," + policy_names() + "; choose one of them";
}

int32_t valued_policy::choose(const std::vector<int32_t> & candidates) {
    int32_t best = candidates[0];
    for (const int32_t expert : candidates) {
        best = value[expert] < value[best] ? expert : best;
    }
    return best;
}

void valued_policy::scale_down(double max_clock) {
    if (clock > max_clock) {
        for (double & each : value) {
            each /= max_clock;
        }
        clock /= max_clock;
    }
}

} // namespace rotary
