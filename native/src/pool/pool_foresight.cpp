// SPDX-License-Identifier: MIT
//
// Pool: who foretells what its layers will want. See pool.hpp; how it is followed is foresight.cpp.

#include "base/error.hpp"
#include "pool/pool.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

bool pool::has_experts_on_device() const {
    return std::any_of(tensors_.begin(), tensors_.end(),
                       [](const auto & tensor) { return tensor->on_device != nullptr; });
}

bool pool::applies_routers() const {
    const bool named = config.predictor != automatic_predictor && config.predictor != router_predictor;
    return config.own_predictor == nullptr && !named;
}

std::string pool::predictor_name() const {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    return predictor_name_;
}

// Slots have been allocated. What a predictor has learnt stays when they are allocated anew.
void pool::choose_predictor() {
    const bool by_device =
        std::any_of(layers_.begin(), layers_.end(), [&](const auto & layer) { return resolves_on_device(*layer, 1); });
    if (!config.prefetch || (direct_ == nullptr && !by_device)) {
        drop_predictor();
        learnt_.clear();
        return;
    }
    if (by_device) {
        if (!applies_routers()) {
            notice(format("%s: the GPU resolves lookups itself, so what it copies ahead is named by the next layers' "
                          "routers, not by %s",
                          config.model.c_str(),
                          config.own_predictor ? "the predictor given" : config.predictor.c_str()));
        }
    } else if (!applies_routers()) {
        make_predictor(config.own_predictor != nullptr ? "own" : config.predictor);
        return;
    }
    if (predictor_) {
        make_predictor(best_without_router);
        return;
    }
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    predictor_name_ = router_predictor;
}

void pool::drop_predictor() {
    predictor_.reset();
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    predictor_name_.clear();
}

void pool::make_predictor(const std::string & name) {
    int32_t n_expert = 1;
    for (const auto & layer : layers_) {
        n_expert = std::max(n_expert, layer->n_expert);
    }
    const std::pair<size_t, int32_t> shape{ layers_.size(), n_expert };
    if (predictor_ && predicted_ == shape) {
        return;
    }
    predictor_ = predictor_new(name, { (int32_t) layers_.size(), n_expert, config.own_predictor });
    predicted_ = shape;
    for (const auto & layer : layers_) {
        const auto its = learnt_.find(layer->il);
        if (its != learnt_.end() && its->second.popularity.size() == (size_t) n_expert) {
            const auto before = layer->index > 0 ? learnt_.find(layers_[layer->index - 1]->il) : learnt_.end();
            predictor_->learn(layer->index, its->second.popularity.data(),
                              before != learnt_.end() ? its->second.pairs.data() : nullptr,
                              before != learnt_.end() ? before->second.popularity.data() : nullptr,
                              its->second.n_tokens);
        }
    }
    learnt_.clear(); // it has them
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    predictor_name_ = (applies_routers() ? std::string(router_predictor) + ", " : "") + name;
}

void pool::forget_guesses() {
    for (const auto & layer : layers_) {
        for (std::vector<guess> & guesses : layer->foretold) {
            guesses.clear();
        }
    }
}

void pool::no_router(const paged_layer & layer, const std::string & why) {
    const bool others = config.predictor == automatic_predictor && !has_experts_on_device();
    if (others) {
        make_predictor(best_without_router);
    }
    if (no_router_said_) {
        return;
    }
    no_router_said_ = true;
    notice(format(
        "%s: the router of layer %d, and maybe others, cannot be applied early, %s; what they will want is %s",
        config.model.c_str(), layer.il, why.c_str(),
        others ? format("foretold from routings, less well (%s)", best_without_router).c_str() : "not brought ahead"));
}

int32_t pool::learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens) {
    if (prepared_) {
        return fail(ROTARY_ERR_STATE, format("%s: its slots are allocated; begin with another profile before that",
                                             config.model.c_str()));
    }
    learnt & its = learnt_[il];
    its.popularity.assign(popularity, popularity + n_expert);
    its.pairs.assign(pairs, pairs + (pairs != nullptr ? (size_t) n_expert * n_expert : 0));
    its.n_tokens = n_tokens;
    return ROTARY_OK;
}

void pool::note_use(const paged_layer & layer, const std::vector<int32_t> & ids, int64_t n_used) {
    const auto n_tokens = (int32_t) (ids.size() / n_used);
    split_.note(layer.index, ids.data(), (int32_t) n_used, n_tokens);
    if (predictor_) {
        predictor_->note(layer.index, ids.data(), (int32_t) n_used, n_tokens);
    }
}

} // namespace rotary
