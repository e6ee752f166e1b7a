// SPDX-License-Identifier: MIT
//
// Environment: the pool's configuration in the variables ROTARY_*, read once, when ggml loads the library.
// Threading: any thread.

#pragma once

#include "pool/pool.hpp"

namespace rotary {

bool read_environment(pool_config & config); // false with this thread's error if a variable is not understood

} // namespace rotary
