// SPDX-License-Identifier: MIT
//
// Computing in a forked child. See forked_compute.hpp.

#include "base/forked_compute.hpp"

#include "base/error.hpp"
#include "base/fork.hpp"
#include "base/inner_device.hpp"

#include <system_error>
#include <thread>

namespace rotary {

bool begin_computation(ggml_backend_t inner) {
    static thread_local uint32_t computed_in = 0; // fork_generation() + 1 when this thread first computed; 0 before

    const uint32_t now = fork_generation() + 1;
    if (computed_in == 0) {
        computed_in = now;
    }
    ggml_backend_dev_t dev = ggml_backend_get_device(inner);
    return computed_in == now || !inner_is_cpu(dev) || inner_starts_threads(dev);
}

ggml_status on_new_thread(const std::function<ggml_status()> & compute) {
    ggml_status   status = GGML_STATUS_FAILED;
    rotary_status error  = ROTARY_OK;
    std::string   text;
    try {
        std::thread([&] {
            status = compute();
            error  = last_status();
            text   = last_error();
        }).join();
    } catch (const std::system_error & refused) {
        fail(ROTARY_ERR_STATE, format("rotary: this process was forked after it had computed, and no thread to compute "
                                      "with can be started: %s; raise the limit of processes, or load the model here",
                                      refused.code().message().c_str()));
        return GGML_STATUS_FAILED;
    }
    if (error != ROTARY_OK) {
        set_error(error, text);
    }
    return status;
}

} // namespace rotary
