// SPDX-License-Identifier: MIT
//
// Router finder. See router_finder.hpp.

#include "prefetch/router_finder.hpp"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <utility>

namespace rotary {

static ggml_backend_buffer_t buffer_of(const ggml_tensor * weight) {
    return weight->view_src != nullptr ? weight->view_src->buffer : weight->buffer;
}

std::vector<float> read_weight(const ggml_tensor * weight) {
    if (weight == nullptr) {
        return {};
    }
    const ggml_backend_buffer_t buffer = buffer_of(weight);
    const auto *                traits = ggml_get_type_traits(weight->type);
    std::vector<float>          values(ggml_nelements(weight));
    if (buffer == nullptr || buffer->iface.get_tensor == nullptr || !ggml_is_contiguous(weight) ||
        (weight->type != GGML_TYPE_F32 && traits->to_float == nullptr)) {
        return {};
    }
    std::vector<char> bytes(ggml_nbytes(weight));
    ggml_backend_tensor_get(weight, bytes.data(), 0, bytes.size());
    if (weight->type == GGML_TYPE_F32) {
        std::copy_n((const float *) (const void *) bytes.data(), values.size(), values.begin());
    } else {
        traits->to_float(bytes.data(), values.data(), (int64_t) values.size());
    }
    return values;
}

static bool is_weight(const ggml_tensor * tensor, int64_t n) {
    return tensor != nullptr && tensor->op == GGML_OP_NONE && ggml_nelements(tensor) == n;
}

router_weights find_router(const ggml_tensor * ids, int32_t n_expert) {
    static constexpr int max_steps = 24;

    router_weights      found;
    const ggml_tensor * at = ids;
    for (int step = 0; at != nullptr && step < max_steps; step++, at = at->src[0]) {
        if (at->op == GGML_OP_ADD && is_weight(at->src[1], n_expert)) {
            found.bias = at->src[1];
        } else if (at->op == GGML_OP_UNARY && found.bias != nullptr && found.selection == nullptr) {
            std::swap(found.bias, found.selection);
        } else if (at->op == GGML_OP_MUL_MAT && at->src[0]->op == GGML_OP_NONE && at->src[0]->ne[1] == n_expert) {
            break;
        }
    }
    if (at == nullptr || at->op != GGML_OP_MUL_MAT) {
        return {};
    }
    found.router              = at->src[0];
    const ggml_tensor * input = at->src[1];
    while (input->op == GGML_OP_RESHAPE || input->op == GGML_OP_VIEW) {
        input = input->src[0];
    }
    if (input->op == GGML_OP_MUL && is_weight(input->src[1], found.router->ne[0])) {
        found.norm = input->src[1];
    }
    return found;
}

bool is_on_device(const ggml_tensor * weight, ggml_backend_t inner) {
    const ggml_backend_buffer_t buffer = buffer_of(weight);
    return buffer != nullptr && weight->type == GGML_TYPE_F32 && ggml_is_contiguous(weight) &&
           ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) == ggml_backend_get_device(inner);
}

void copy_router(router & to, const ggml_tensor * ids, int32_t n_expert) {
    const router_weights found = find_router(ids, n_expert);
    if (found.router == nullptr) {
        return;
    }
    const std::vector<float> weight = read_weight(found.router);
    if ((int64_t) weight.size() == found.router->ne[0] * n_expert) {
        to.set(weight, read_weight(found.norm), read_weight(found.bias), read_weight(found.selection),
               found.router->ne[0]);
    }
}

} // namespace rotary
