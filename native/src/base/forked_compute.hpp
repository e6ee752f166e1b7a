// SPDX-License-Identifier: MIT
//
// Computing in a forked child, where OpenMP would wait for threads that only the parent has. See fork.hpp.
// Threading: any thread.

#pragma once

#include "ggml-backend.h"

#include <functional>

namespace rotary {

// Call before every computation. False if this thread must not compute on `inner`: it computed before the fork, so OpenMP
// would wait for the threads that it keeps for each computing thread, and that a child lacks.
bool begin_computation(ggml_backend_t inner);

// Compute on a new thread and take over its error. GGML_STATUS_FAILED if the thread cannot be started.
ggml_status on_new_thread(const std::function<ggml_status()> & compute);

} // namespace rotary
