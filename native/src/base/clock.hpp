// SPDX-License-Identifier: MIT
//
// The clock for all figures: microseconds, monotonic.

#pragma once

#include <chrono>
#include <cstdint>

namespace rotary {

inline uint64_t now_us() {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

} // namespace rotary
