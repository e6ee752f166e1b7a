// SPDX-License-Identifier: MIT
//
// C API: pools. See rotary.h.

#include "rotary.h"

#include "base/error.hpp"
#include "ggml/device.hpp"

#include <cstdio>

using namespace rotary;

struct rotary_pool {
    device *              dev;
    std::shared_ptr<pool> shared;
};

rotary_pool * rotary_pool_open(int32_t index, const rotary_config * config) try {
    device * dev = device_at(index);
    if (dev == nullptr) {
        return nullptr;
    }
    if (config->struct_size != sizeof(rotary_config)) {
        fail(ROTARY_ERR_ARG, format("rotary_config: %zu bytes given, %zu expected; rebuild the caller",
                                    config->struct_size, sizeof(rotary_config)));
        return nullptr;
    }
    pool_config    chosen;
    model_config & model       = chosen.model;
    model.budget_text          = config->budget != nullptr ? config->budget : "auto";
    model.name                 = config->model != nullptr ? config->model : "model";
    model.margin_bytes         = config->margin_bytes;
    model.repack               = config->repack != 0;
    model.compute_from_mapping = config->direct != 0;
    model.adaptive             = config->adaptive != 0;
    model.staging_bytes        = config->staging_bytes;
    model.policy               = config->policy != nullptr ? config->policy : automatic_policy;
    model.own_policy           = config->own_policy;
    chosen.prefetch.on         = config->prefetch != 0;
    chosen.prefetch.predictor  = config->predictor != nullptr ? config->predictor : automatic_predictor;
    chosen.prefetch.own        = config->own_predictor;
    if (!store_parse(config->store != nullptr ? config->store : "auto", model.store)) {
        fail(ROTARY_ERR_ARG, format("store %s: not known; auto, mmap or direct; correct it", config->store));
        return nullptr;
    }
    if (!pin_parse(config->pin != nullptr ? config->pin : "auto", model.pin)) {
        fail(ROTARY_ERR_ARG, format("pin %s: not known; auto, on or off; correct it", config->pin));
        return nullptr;
    }
    if (!policy_known(model.policy)) {
        fail(ROTARY_ERR_ARG, policy_not_known(model.policy));
        return nullptr;
    }
    if (!predictor_known(chosen.prefetch.predictor)) {
        fail(ROTARY_ERR_ARG, predictor_not_known(chosen.prefetch.predictor));
        return nullptr;
    }
    if (!budget_parse(model.budget_text, model.wanted) || model.wanted.what == budget::kind::off) {
        fail(ROTARY_ERR_ARG, budget_not_understood(model.budget_text));
        return nullptr;
    }
    return new rotary_pool{ dev, dev->open_pool(chosen) };
} catch (...) {
    fail_by_exception();
    return nullptr;
}

void rotary_pool_close(rotary_pool * handle) {
    if (handle != nullptr) {
        handle->dev->stop_collecting(handle->shared.get());
        delete handle;
    }
}

// Wait for the graph that runs over the pool, then change it; that graph's callbacks cannot make a change.
template <typename function> static int32_t change(rotary_pool * handle, const function & make) try {
    pool & changed = *handle->shared;
    if (changed.lock.held_here()) {
        return fail(ROTARY_ERR_STATE,
                    format("%s: asked for a change by a policy, a predictor or a log callback, while a graph "
                           "runs; these may ask for figures only; change it between runs",
                           changed.model.config.name.c_str()));
    }
    const pool_lock::hold held(changed.lock);
    return make(changed);
} catch (...) {
    return fail_by_exception();
}

int32_t rotary_pool_prepare(rotary_pool * handle) {
    return change(handle, [](pool & changed) { return changed.prepare(); });
}

int32_t rotary_pool_set_budget(rotary_pool * handle, const char * text) try {
    budget wanted;
    if (!budget_parse(text, wanted) || wanted.what == budget::kind::off) {
        return fail(ROTARY_ERR_ARG, budget_not_understood(text));
    }
    return change(handle, [&](pool & changed) {
        changed.set_budget(wanted, text);
        return ROTARY_OK;
    });
} catch (...) {
    return fail_by_exception();
}

int32_t rotary_pool_stats(rotary_pool * handle, rotary_stats * stats) try {
    *stats = handle->shared->stats();
    return ROTARY_OK;
} catch (...) {
    return fail_by_exception();
}

int32_t rotary_pool_layer_stats(rotary_pool * handle, int32_t index, rotary_layer_stats * stats) try {
    if (!handle->shared->model.stats.layer(index, *stats)) {
        return fail(ROTARY_ERR_ARG, format("layer %d: not one of the pool's paged layers", index));
    }
    return ROTARY_OK;
} catch (...) {
    return fail_by_exception();
}

void rotary_pool_reset_counters(rotary_pool * handle) {
    handle->shared->model.stats.reset();
}

const char * rotary_pool_notice(rotary_pool * handle, int32_t index) {
    return handle->shared->model.notices.text(index);
}

int32_t rotary_pool_warm(rotary_pool * handle, int32_t il, const int32_t * experts, int32_t n) {
    return change(handle, [&](pool & changed) { return changed.warm(il, { experts, experts + n }); });
}

int32_t rotary_pool_learn(rotary_pool * handle, int32_t il, const float * popularity, const float * pairs,
                          int32_t n_expert, int64_t n_tokens) {
    return change(handle, [&](pool & changed) { return changed.learn(il, popularity, pairs, n_expert, n_tokens); });
}

void rotary_pool_predictor(rotary_pool * handle, char * text, size_t n) try {
    snprintf(text, n, "%s", handle->shared->predicted.name().c_str());
} catch (...) {
    fail_by_exception();
    *text = '\0';
}

const char * rotary_pool_policy(rotary_pool * handle) {
    return handle->shared->policy_name();
}

int32_t rotary_pool_trace(rotary_pool * handle, int32_t on) {
    return change(handle, [&](pool & changed) { // a graph is recorded whole or not at all
        changed.trace(on != 0);
        return ROTARY_OK;
    });
}

int64_t rotary_pool_trace_read(rotary_pool * handle, int32_t * records, int64_t n, uint64_t * n_untraced) try {
    return handle->shared->model.trace.read(records, n, *n_untraced);
} catch (...) {
    return fail_by_exception();
}
