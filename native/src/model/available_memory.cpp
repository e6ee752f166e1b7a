// SPDX-License-Identifier: MIT
//
// Available memory. See available_memory.hpp.

#include "model/available_memory.hpp"

#include "base/memory.hpp"

#include <algorithm>

namespace rotary {

uint64_t host_margin(uint64_t total) {
    return std::max<uint64_t>(total / 24, 64u << 20);
}

uint64_t margin_bytes(const paged_model & model, uint64_t total) {
    if (model.config.margin_bytes != 0) {
        return model.config.margin_bytes;
    }
    return model.inner_is_host() ? host_margin(total) : std::max<uint64_t>(total / 10, 512u << 20);
}

uint64_t free_bytes(const paged_model & model) {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(model.inner, &free, &total);
    uint64_t wanted = margin_bytes(model, total);
    uint64_t left   = free;
    if (model.inner_is_host()) { // the CPU backend reports all of the machine's memory as free
        const host_memory memory = host_memory_now();
        left                     = memory.available;
        // Graphs seldom touch all at once what they have not touched by now: half of it, beside the margin, is enough.
        const uint64_t promised = host_memory_promised();
        wanted = margin_bytes(model, memory.total) + (model.slots.is_allocated() ? promised / 2 : promised);
    }
    return left > wanted ? left - wanted : 0;
}

} // namespace rotary
