// SPDX-License-Identifier: MIT
//
// Entry point: what ggml_backend_load() calls. Refuses a ggml it was not compiled against, then registers one ROTARY
// device for each inner device.

#include "base/error.hpp"
#include "ggml/device.hpp"
#include "ggml/inner.hpp"

#include "ggml-impl.h"

#include <cstdlib>
#include <cstring>
#include <sstream>

namespace rotary {

static const char * reg_get_name(ggml_backend_reg_t) {
    return "ROTARY";
}

static size_t reg_get_device_count(ggml_backend_reg_t) {
    return devices().size();
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t, size_t index) {
    GGML_ASSERT(index < devices().size());
    return devices()[index]->handle();
}

static ggml_backend_buffer_type_t * reg_get_extra_bufts(ggml_backend_dev_t dev) {
    return ((device *) dev->context)->extra_bufts();
}

// A function of the inner device's registry, for a backend of ours.
template <typename fn_t> static fn_t inner_function(ggml_backend_t backend, const char * name) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_inner(backend)));
    return (fn_t) ggml_backend_reg_get_proc_address(reg, name);
}

static void reg_set_n_threads(ggml_backend_t backend, int n_threads) {
    const auto fn = inner_function<ggml_backend_set_n_threads_t>(backend, "ggml_backend_set_n_threads");
    if (fn != nullptr) {
        fn(backend_inner(backend), n_threads);
    }
}

static void reg_set_abort_callback(ggml_backend_t backend, ggml_abort_callback abort, void * data) {
    const auto fn = inner_function<ggml_backend_set_abort_callback_t>(backend, "ggml_backend_set_abort_callback");
    if (fn != nullptr) {
        fn(backend_inner(backend), abort, data);
    }
}

static void * reg_get_proc_address(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_dev_get_extra_bufts") == 0) {
        return (void *) reg_get_extra_bufts;
    }
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return (void *) reg_set_n_threads;
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return (void *) reg_set_abort_callback;
    }
    return nullptr;
}

static ggml_backend_reg reg = {
    /* .api_version = */ GGML_BACKEND_API_VERSION,
    /* .iface       = */ { reg_get_name, reg_get_device_count, reg_get_device, reg_get_proc_address },
    /* .context     = */ nullptr,
};

// ggml_commit() is abbreviated, ends in "-dirty" if the source was modified, and is "unknown" in a build without git,
// where the version and the checks below must do.
static bool commit_matches(std::string in_use) {
    const std::string built = ROTARY_GGML_COMMIT;
    in_use                  = in_use.substr(0, in_use.find("-dirty"));
    return in_use == "unknown" || built == "unknown" || built.compare(0, in_use.size(), in_use) == 0;
}

// The API version is not enough: struct layouts have changed under the same number. Release and commit must be those of
// the build, and since a release can be patched locally, the sizes and ops we rely on must match too.
static bool ggml_matches() {
    if (strcmp(ggml_version(), ROTARY_GGML_VERSION) != 0 || !commit_matches(ggml_commit())) {
        fail(ROTARY_ERR_VERSION, format("libggml-rotary.so: compiled against ggml %s (%s), loaded into ggml %s (%s); "
                                        "rebuild it against the llama.cpp in use",
                                        ROTARY_GGML_VERSION, ROTARY_GGML_COMMIT, ggml_version(), ggml_commit()));
        return false;
    }
    const size_t in_use   = ggml_tensor_overhead();
    const size_t expected = sizeof(ggml_tensor) + 32; // 32: struct ggml_object, private to ggml.c
    if (in_use != expected || strcmp(ggml_op_name(GGML_OP_MUL_MAT_ID), "MUL_MAT_ID") != 0 ||
        strcmp(ggml_op_name(GGML_OP_GLU), "GLU") != 0) {
        fail(ROTARY_ERR_VERSION, format("libggml-rotary.so: ggml %s in use is patched (tensors of %zu bytes, %zu "
                                        "expected); rebuild against its source",
                                        ggml_version(), in_use, expected));
        return false;
    }
    return true;
}

static bool make_devices(const pool_config & environment) {
    std::vector<std::pair<std::string, ggml_backend_dev_t>> inner;
    const char *                                            names = getenv("ROTARY_INNER");
    if (names != nullptr && *names != '\0') {
        std::istringstream list(names);
        std::string        name;
        name.reserve(strlen(names)); // getline() would take a failed allocation for the end of the text
        while (std::getline(list, name, ',')) {
            ggml_backend_dev_t dev = inner_find(name);
            if (dev == nullptr) {
                return false;
            }
            inner.emplace_back(name, dev);
        }
    } else {
        for (ggml_backend_dev_t dev : inner_default()) {
            inner.emplace_back(ggml_backend_dev_name(dev), dev);
        }
    }
    if (inner.empty()) {
        fail(ROTARY_ERR_DEVICE, "libggml-rotary.so: this llama.cpp has no device to wrap; load its CPU backend first");
        return false;
    }
    for (const auto & [name, dev] : inner) {
        devices().push_back(std::make_unique<device>(&reg, (int) devices().size(), dev, name, environment));
    }
    return true;
}

} // namespace rotary

extern "C" {
GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void);
}

ggml_backend_reg_t ggml_backend_init(void) {
    using namespace rotary;
    return guarded((ggml_backend_reg_t) nullptr, [] {
        pool_config environment;
        const bool  registered = !devices().empty(); // ggml may load the same file twice
        const bool  fine = registered || (ggml_matches() && read_environment(environment) && make_devices(environment));
        return fine ? &reg : nullptr;
    });
}
