// SPDX-License-Identifier: MIT
//
// Device prefetch: where the inner device resolves lookups itself, it also applies the next layer's router early, and
// the link copies the experts that this predicts. Here the host tells the link what that takes.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/paged_model.hpp"
#include "prefetch/predictions.hpp"

#include "ggml-backend.h"
#include "ggml.h"

namespace rotary {

// Fill in `prediction` for the next layer's lookup; false if it cannot be predicted. `node`: this lookup's MUL_MAT_ID.
bool predict_on_device(paged_model & model, predictions & predicted, const paged_layer & layer,
                       const ggml_tensor * node, ggml_backend_t inner, rotary_link_prediction & prediction);

} // namespace rotary
