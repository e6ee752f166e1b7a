// SPDX-License-Identifier: MIT
//
// Router finder: a layer's router as a graph has it: the matrix whose product, through whatever a model puts in between,
// became the ids. So every architecture's is found, under no particular name.

#pragma once

#include "prefetch/router.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace rotary {

// The weights of a layer's router. NULL where there are none.
struct router_weights {
    const ggml_tensor * router    = nullptr; // [n_embd, n_expert]
    const ggml_tensor * norm      = nullptr; // [n_embd] of the norm before it
    const ggml_tensor * bias      = nullptr; // [n_expert] added to the logits
    const ggml_tensor * selection = nullptr; // [n_expert] added to what the logits became
};

router_weights find_router(const ggml_tensor * ids, int32_t n_expert);

// A weight as floats; empty if it is NULL or cannot be read where it lies.
std::vector<float> read_weight(const ggml_tensor * weight);

// Whether these are floats that the inner device can read where they are.
bool is_on_device(const ggml_tensor * weight, ggml_backend_t inner);

// Set `to` from the router that became `ids`, unless there is none or it cannot be read.
void copy_router(router & to, const ggml_tensor * ids, int32_t n_expert);

} // namespace rotary
