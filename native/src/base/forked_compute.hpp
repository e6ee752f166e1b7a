// SPDX-License-Identifier: MIT
//
// Computing in a forked child, whose copy of OpenMP waits for threads that are not there. See fork.hpp.
// Threading: any thread.

#pragma once

#include "ggml-backend.h"

#include <functional>

namespace rotary {

// OpenMP keeps threads for each thread that computes. In a child those are gone, and it would wait for them: a thread that
// computed before the fork must leave computing to another one. True if `inner` uses OpenMP and this is such a thread.
bool lost_threads(ggml_backend_t inner);

// Compute on a new thread, and take over its error. GGML_STATUS_FAILED if the thread cannot be started.
ggml_status on_new_thread(const std::function<ggml_status()> & compute);

} // namespace rotary
