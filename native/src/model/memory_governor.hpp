// SPDX-License-Identifier: MIT
//
// Memory governor: shrinks slots in host memory when memory runs short, and grows them again when there is plenty.
// Threading: none of its own; the pool locks.

#pragma once

#include "base/memory.hpp"
#include "model/paged_model.hpp"
#include "model/sizing.hpp"

#include <cstdint>

namespace rotary {

class memory_governor {
  public:
    memory_governor(paged_model & model, const sizing & sized) : model_(model), sized_(sized) {}

    void start();  // call when slots have been allocated
    void follow(); // call between graphs

  private:
    uint64_t bytes_wanted(const host_memory & memory, uint64_t now);
    void     resize(uint64_t bytes);

    paged_model &  model_;
    const sizing & sized_;
    uint64_t       seen_us_         = 0;
    uint64_t       growth_tried_us_ = 0;
};

} // namespace rotary
