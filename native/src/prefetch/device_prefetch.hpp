// SPDX-License-Identifier: MIT
//
// Device prefetch: what the link needs to predict the next layer's lookup at this one, where the inner device resolves both:
// then the device applies the next layer's router itself, and copies what it names.

#pragma once

#include "model/paged_model.hpp"
#include "prefetch/predictions.hpp"

#include "ggml-backend.h"
#include "ggml.h"

namespace rotary {

// `node` is the multiplication that the lookup is for. False if the next layer cannot be predicted.
bool predict_on_device(paged_model & model, predictions & predicted, const paged_layer & layer,
                       const ggml_tensor * node, ggml_backend_t inner, rotary_link_prediction & prediction);

} // namespace rotary
