// SPDX-License-Identifier: MIT
//
// Environment: the configuration of pools that llama.cpp alone opens, read once, when ggml loads the library.

#include "base/error.hpp"
#include "ggml/device.hpp"

#include <cstdlib>
#include <utility>

namespace rotary {

static std::string text_of(const char * name) {
    const char * text = getenv(name);
    return text != nullptr ? text : "";
}

static bool refuse(const std::string & text) {
    fail(ROTARY_ERR_ARG, text);
    return false;
}

bool read_environment(pool_config & config) {
    model_config & model = config.model;
    if (const std::string text = text_of("ROTARY_BUDGET"); !text.empty()) {
        model.budget_text = text;
        if (!budget_parse(text, model.wanted)) {
            return refuse("ROTARY_BUDGET: " + budget_not_understood(text));
        }
    }
    uint64_t                                  ram_bytes = 0; // read anew whenever slots in RAM are allocated
    const std::pair<const char *, uint64_t *> sizes[]   = { { "ROTARY_MARGIN", &model.margin_bytes },
                                                            { "ROTARY_STAGING", &model.staging_bytes },
                                                            { "ROTARY_RAM", &ram_bytes } };
    for (const auto & [name, bytes] : sizes) {
        budget parsed;
        if (const std::string text = text_of(name); !text.empty()) {
            if (!budget_parse(text, parsed) || parsed.what != budget::kind::bytes) {
                return refuse(
                    format("%s=%s: not a size; more than 0 bytes; write for example 512MiB", name, text.c_str()));
            }
            *bytes = (uint64_t) parsed.value;
        }
    }
    if (const std::string text = text_of("ROTARY_POLICY"); !text.empty()) {
        if (!policy_known(text)) {
            return refuse("ROTARY_POLICY: " + policy_not_known(text));
        }
        model.policy = text;
    }
    const std::string prefetch = text_of("ROTARY_PREFETCH");
    config.prefetch.on         = prefetch != "0";
    if (!prefetch.empty() && prefetch != "0" && prefetch != "1") {
        if (!predictor_known(prefetch)) {
            return refuse("ROTARY_PREFETCH: " + predictor_not_known(prefetch));
        }
        config.prefetch.predictor = prefetch;
    }
    const std::string split = text_of("ROTARY_SPLIT");
    model.adaptive          = split != "even";
    if (!split.empty() && split != "even" && split != "adaptive") {
        return refuse(format("ROTARY_SPLIT=%s: no such split; even or adaptive; choose one of them", split.c_str()));
    }
    const std::string store = text_of("ROTARY_STORE");
    if (!store.empty() && !store_parse(store, model.store)) {
        return refuse(
            format("ROTARY_STORE=%s: no such store; auto, mmap or direct; choose one of them", store.c_str()));
    }
    const std::string pin = text_of("ROTARY_PIN");
    if (!pin.empty() && !pin_parse(pin, model.pin)) {
        return refuse(format("ROTARY_PIN=%s: not understood; auto, on or off; choose one of them", pin.c_str()));
    }
    model.repack               = text_of("ROTARY_REPACK") != "0";
    model.compute_from_mapping = text_of("ROTARY_DIRECT") != "0";
    return true;
}

} // namespace rotary
