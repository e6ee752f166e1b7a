// SPDX-License-Identifier: MIT
//
// Computing in a forked child, whose copy of OpenMP waits for threads that are not there. See fork.hpp.
// Threading: any thread.

#pragma once

#include "ggml-backend.h"

#include <functional>

namespace rotary {

// OpenMP keeps its threads for each thread that computes. In a child those are gone, and it waits for them: a thread that
// had computed before the fork must leave computing to another. True if `inner` computes so and this is such a thread.
bool lost_threads(ggml_backend_t inner);

// Compute on a thread of its own, and have its error here. GGML_STATUS_FAILED if it cannot be started.
ggml_status on_new_thread(const std::function<ggml_status()> & compute);

} // namespace rotary
