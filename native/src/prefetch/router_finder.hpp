// SPDX-License-Identifier: MIT
//
// Router finder: finds a layer's router by walking a graph back from the ids to the matrix product they come from, so
// it depends on no architecture and on no tensor's name.

#pragma once

#include "prefetch/router.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace rotary {

// A layer's router and the weights around it; NULL where it has none.
struct router_weights {
    const ggml_tensor * router    = nullptr; // [n_embd, n_expert]
    const ggml_tensor * norm      = nullptr; // [n_embd] of the norm before it
    const ggml_tensor * bias      = nullptr; // [n_expert] added to the logits
    const ggml_tensor * selection = nullptr; // [n_expert] added to the activated logits, for choosing
};

router_weights find_router(const ggml_tensor * ids, int32_t n_expert);

// A weight converted to floats; empty if it is NULL or cannot be read.
std::vector<float> read_weight(const ggml_tensor * weight);

// Whether a weight is contiguous F32 in the inner device's memory.
bool is_on_device(const ggml_tensor * weight, ggml_backend_t inner);

// Set `to` from the router that `ids` come from, unless there is none or it cannot be read.
void copy_router(router & to, const ggml_tensor * ids, int32_t n_expert);

} // namespace rotary
