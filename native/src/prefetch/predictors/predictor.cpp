// SPDX-License-Identifier: MIT
//
// Predictors by name. See predictor.hpp.

#include "prefetch/predictors/predictor.hpp"

#include <algorithm>

namespace rotary {

struct known_predictor {
    const char * name;
    std::unique_ptr<predictor> (*make)(const predictor_setting & setting);
};

static const known_predictor known[] = {
    { "previous", previous_new },
    { "popular", popular_new },
    { "transition",
      [](const predictor_setting & setting) { return std::unique_ptr<predictor>(transition_new(setting)); } },
    { "similar", [](const predictor_setting & setting) { return std::unique_ptr<predictor>(similar_new(setting)); } },
    { "mixed", mixed_new },
};

std::unique_ptr<predictor> predictor_new(const std::string & name, const predictor_setting & setting) {
    if (setting.own != nullptr) {
        return own_predictor_new(setting);
    }
    for (const known_predictor & each : known) {
        if (name == each.name) {
            return each.make(setting);
        }
    }
    return nullptr;
}

const char * predictor_names() {
    static const std::string names = [] {
        std::string all;
        for (const known_predictor & each : known) {
            all += (all.empty() ? "" : ",") + std::string(each.name);
        }
        return all;
    }();
    return names.c_str();
}

bool predictor_known(const std::string & name) {
    return name == automatic_predictor || name == router_predictor ||
           std::any_of(std::begin(known), std::end(known), [&](const auto & each) { return name == each.name; });
}

std::string predictor_not_known(const std::string & name) {
    return "predictor " + name + ": not known; " + automatic_predictor + "," + router_predictor + "," +
           predictor_names() + "; choose one of them";
}

void scoring_predictor::name(int32_t layer, int32_t ahead, int32_t n, std::vector<int32_t> & experts) {
    experts.clear();
    score_.assign(n_expert_, 0);
    if (!score(layer, ahead, score_)) {
        return;
    }
    for (int32_t expert = 0; expert < n_expert_; expert++) {
        if (score_[expert] > 0) {
            experts.push_back(expert);
        }
    }
    n = std::min(n, (int32_t) experts.size());
    std::partial_sort(experts.begin(), experts.begin() + n, experts.end(),
                      [&](int32_t a, int32_t b) { return score_[a] > score_[b] || (score_[a] == score_[b] && a < b); });
    experts.resize(n);
}

} // namespace rotary
