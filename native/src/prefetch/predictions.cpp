// SPDX-License-Identifier: MIT
//
// Predictions. See predictions.hpp.

#include "prefetch/predictions.hpp"

#include "base/error.hpp"
#include "model/device_memory.hpp"

#include <algorithm>

namespace rotary {

void layer_prediction::forget_guesses() {
    for (std::vector<guess> & each : guesses) {
        each.clear();
    }
}

// ---- the predictor

bool predictions::applies_routers() const {
    const bool others = config_.predictor != automatic_predictor && config_.predictor != router_predictor;
    return config_.own == nullptr && !others;
}

std::string predictions::name() const {
    const std::lock_guard<std::mutex> lock(name_mutex_);
    return name_;
}

void predictions::set_name(const std::string & name) {
    const std::lock_guard<std::mutex> lock(name_mutex_);
    name_ = name;
}

void predictions::start() {
    layers_.clear();
    layers_.resize(model_.experts.layers().size());
    const bool by_device = model_.tables.any();
    if (!config_.on || (model_.store.direct() == nullptr && !by_device)) {
        predictor_.reset();
        profiles_.clear();
        set_name("");
        return;
    }
    if (by_device && !applies_routers()) {
        model_.notices.say(format(
            "%s: the GPU resolves lookups itself, so what it prefetches is named by the next layers' "
            "routers, not by %s",
            model_.config.name.c_str(), config_.own != nullptr ? "the predictor given" : config_.predictor.c_str()));
    } else if (!applies_routers()) {
        make(config_.own != nullptr ? "own" : config_.predictor);
        return;
    }
    if (predictor_) {
        make(best_without_router);
        return;
    }
    set_name(router_predictor);
}

void predictions::make(const std::string & predictor) {
    int32_t n_expert = 1;
    for (const auto & layer : model_.experts.layers()) {
        n_expert = std::max(n_expert, layer->n_expert);
    }
    const std::pair<size_t, int32_t> shape{ layers_.size(), n_expert };
    if (predictor_ && made_for_ == shape) {
        return;
    }
    predictor_                   = predictor_new(predictor, { (int32_t) layers_.size(), n_expert, config_.own });
    made_for_                    = shape;
    const profile * before_layer = nullptr;
    for (const auto & layer : model_.experts.layers()) {
        const auto      found = profiles_.find(layer->il);
        const bool      fits  = found != profiles_.end() && found->second.popularity.size() == (size_t) n_expert;
        const profile * known = fits ? &found->second : nullptr;
        if (known != nullptr) {
            const bool pairs = before_layer != nullptr && !known->pairs.empty();
            predictor_->learn(layer->index, known->popularity.data(), pairs ? known->pairs.data() : nullptr,
                              pairs ? before_layer->popularity.data() : nullptr, known->n_tokens);
        }
        before_layer = known;
    }
    profiles_.clear();
    set_name((applies_routers() ? std::string(router_predictor) + ", " : "") + predictor);
}

void predictions::router_missing(const paged_layer & layer, const std::string & why) {
    const bool others = config_.predictor == automatic_predictor && !has_experts_on_device(model_);
    if (others) {
        make(best_without_router);
    }
    if (missing_said_) {
        return;
    }
    missing_said_ = true;
    model_.notices.say(format(
        "%s: the router of layer %d, and maybe others, cannot be applied early, %s; what they will want is %s",
        model_.config.name.c_str(), layer.il, why.c_str(),
        others ? format("predicted from routings, less well (%s)", best_without_router).c_str() : "not prefetched"));
}

void predictions::learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens) {
    profile & known = profiles_[il];
    known.popularity.assign(popularity, popularity + n_expert);
    known.pairs.assign(pairs, pairs + (pairs != nullptr ? (size_t) n_expert * n_expert : 0));
    known.n_tokens = n_tokens;
}

void predictions::note(const paged_layer & layer, const std::vector<int32_t> & ids, int64_t n_used) {
    if (predictor_) {
        predictor_->note(layer.index, ids.data(), (int32_t) n_used, (int32_t) (ids.size() / n_used));
    }
}

// ---- what is predicted

void predictions::forget_guesses() {
    for (layer_prediction & each : layers_) {
        each.forget_guesses();
    }
}

char * predictions::claim(const stored_tensor & tensor, int32_t expert) {
    std::vector<int32_t> keep;
    for (const std::vector<guess> & guesses : layers_[tensor.layer].guesses) {
        for (const guess & each : guesses) {
            keep.push_back(each.expert);
        }
    }
    return model_.targets.reserve(tensor, expert, keep);
}

} // namespace rotary
