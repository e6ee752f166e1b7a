// SPDX-License-Identifier: MIT
//
// Questions to an inner device: what it is, its extra buffer types, which operations it supports; and its events.
// Threading: any thread.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <vector>

namespace rotary {

bool inner_is_cpu(ggml_backend_dev_t inner);          // its kernels may get any host memory; false for NULL
bool inner_has_host_memory(ggml_backend_dev_t inner); // the host can read and write its buffers

// The device's extra buffer types (CPU_REPACK, ...), in the device's order of preference.
std::vector<ggml_backend_buffer_type_t> inner_extra_bufts(ggml_backend_dev_t inner);

// Whether the device supports MUL_MAT_ID with a weight of this type and shape [ne0, ne1, n_expert] in a `buft` buffer.
bool inner_supports_expert_matrix(ggml_backend_dev_t inner, ggml_backend_buffer_type_t buft, ggml_type type,
                                  const int64_t * ne);

// Whether the device supports `op` if the weight lies in a buffer of type `buft`.
bool inner_supports_weight_in(ggml_backend_dev_t inner, ggml_backend_buffer_type_t buft, const ggml_tensor * op);

// Whether this is a CPU device without OpenMP, which starts and ends threads for every graph.
bool inner_starts_threads(ggml_backend_dev_t inner);

// Create the event unless it exists; false if the inner device gives none.
bool make_event(ggml_backend_event_ptr & event, ggml_backend_t inner);

} // namespace rotary
