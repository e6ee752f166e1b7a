// SPDX-License-Identifier: MIT
//
// C API: the library and its devices. See rotary.h.
//
// capi/ defines the functions of rotary.h and nothing else: each checks its arguments, calls the room that does the
// work, and turns exceptions into a status.
// Threading: any thread, since the rooms lock; a slot table, cache or predictor without a pool has no lock.

#include "rotary.h"

#include "base/cpu_trial.hpp"
#include "base/error.hpp"
#include "ggml/device.hpp"
#include "ggml/inner.hpp"

#include <cstring>

using namespace rotary;

// ---- library

int32_t rotary_abi_version(void) {
    return 6;
}

size_t rotary_sizeof(const char * struct_name) {
    static const struct {
        const char * name;
        size_t       size;
    } sizes[] = {
        { "rotary_config", sizeof(rotary_config) },
        { "rotary_stats", sizeof(rotary_stats) },
        { "rotary_layer_stats", sizeof(rotary_layer_stats) },
        { "rotary_layer_size", sizeof(rotary_layer_size) },
        { "rotary_load", sizeof(rotary_load) },
        { "rotary_policy", sizeof(rotary_policy) },
        { "rotary_predictor", sizeof(rotary_predictor) },
    };
    for (const auto & each : sizes) {
        if (strcmp(each.name, struct_name) == 0) {
            return each.size;
        }
    }
    return 0;
}

const char * rotary_built_ggml_version(void) {
    return ROTARY_GGML_VERSION;
}

const char * rotary_built_ggml_commit(void) {
    return ROTARY_GGML_COMMIT;
}

int32_t rotary_last_status(void) {
    return last_status();
}

const char * rotary_last_error(void) {
    return last_error();
}

void rotary_clear_error(void) {
    clear_error();
}

int32_t rotary_cpu_runs(void) {
    return cpu_runs() ? 1 : 0;
}

// ---- devices

int32_t rotary_device_count(void) {
    return (int32_t) devices().size();
}

const char * rotary_device_name(int32_t index) {
    return is_device(index) ? devices()[index]->name().c_str() : nullptr;
}

const char * rotary_device_inner(int32_t index) {
    return is_device(index) ? devices()[index]->inner_name().c_str() : nullptr;
}

int32_t rotary_device_set_inner(int32_t index, const char * inner) try {
    device * dev = device_at(index);
    if (dev == nullptr) {
        return ROTARY_ERR_DEVICE;
    }
    ggml_backend_dev_t found = inner_find(inner != nullptr ? inner : "");
    if (found == nullptr) {
        return ROTARY_ERR_DEVICE;
    }
    if (!dev->set_inner(found, inner)) {
        return fail(ROTARY_ERR_STATE,
                    format("%s: wraps %s for a loaded model, cannot change to %s; close that model first",
                           dev->name().c_str(), dev->inner_name().c_str(), inner));
    }
    return ROTARY_OK;
} catch (...) {
    return fail_by_exception();
}
