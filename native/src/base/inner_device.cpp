// SPDX-License-Identifier: MIT
//
// Questions to an inner device. See inner_device.hpp.

#include "base/inner_device.hpp"

#include <cstring>

namespace rotary {

bool inner_is_cpu(ggml_backend_dev_t inner) {
    return inner != nullptr && ggml_backend_dev_type(inner) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool inner_has_host_memory(ggml_backend_dev_t inner) {
    return ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(inner));
}

bool inner_starts_threads(ggml_backend_dev_t inner) {
    const auto get = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(inner), "ggml_backend_get_features");
    if (!inner_is_cpu(inner) || get == nullptr) {
        return false;
    }
    for (ggml_backend_feature * feature = get(ggml_backend_dev_backend_reg(inner)); feature->name; feature++) {
        if (strcmp(feature->name, "OPENMP") == 0) {
            return false;
        }
    }
    return true;
}

std::vector<ggml_backend_buffer_type_t> inner_extra_bufts(ggml_backend_dev_t inner) {
    std::vector<ggml_backend_buffer_type_t> found;
    ggml_backend_reg_t                      reg = ggml_backend_dev_backend_reg(inner);
    const auto                              get =
        (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    if (get != nullptr) {
        for (ggml_backend_buffer_type_t * buft = get(inner); buft != nullptr && *buft != nullptr; buft++) {
            found.push_back(*buft);
        }
    }
    return found;
}

static ggml_context_ptr small_context() {
    return ggml_context_ptr(ggml_init({ ggml_tensor_overhead() * 8, nullptr, true }));
}

// Devices look at the type of the weight's buffer, so the weight gets an empty buffer of that type for the question.
static bool supports_with(ggml_backend_dev_t inner, ggml_backend_buffer_type_t buft, ggml_tensor * op) {
    const ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(buft, 0));
    op->src[0]->buffer = buffer.get();
    return ggml_backend_dev_supports_op(inner, op);
}

bool inner_supports_expert_matrix(ggml_backend_dev_t inner, ggml_backend_buffer_type_t buft, ggml_type type,
                                  const int64_t * ne) {
    const ggml_context_ptr ctx = small_context();
    // No backend's answer depends on the numbers of tokens and ids; llama.cpp asks with 512 tokens.
    ggml_tensor * weight = ggml_new_tensor_3d(ctx.get(), type, ne[0], ne[1], ne[2]);
    ggml_tensor * input  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, ne[0], 1, 512);
    ggml_tensor * ids    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 512);
    return supports_with(inner, buft, ggml_mul_mat_id(ctx.get(), weight, input, ids));
}

bool inner_supports_weight_in(ggml_backend_dev_t inner, ggml_backend_buffer_type_t buft, const ggml_tensor * op) {
    ggml_tensor weight = *op->src[0];
    ggml_tensor copy   = *op;
    copy.src[0]        = &weight;
    return supports_with(inner, buft, &copy);
}

bool make_event(ggml_backend_event_ptr & event, ggml_backend_t inner) {
    if (!event) {
        event.reset(ggml_backend_event_new(ggml_backend_get_device(inner)));
    }
    return event != nullptr;
}

} // namespace rotary
