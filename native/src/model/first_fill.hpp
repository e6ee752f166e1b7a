// SPDX-License-Identifier: MIT
//
// First fill: what slots hold before the first lookup: every expert where each has a slot, else what a profile says is
// wanted most.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/paged_model.hpp"

#include <cstdint>
#include <map>
#include <vector>

namespace rotary {

class first_fill {
  public:
    // A layer of the model begins with these experts, the most wanted first; an error status if it has no such experts.
    int32_t set(const paged_model & model, int32_t il, std::vector<int32_t> experts);

    int32_t fill(paged_model & model, const paged_layer & layer) const; // an error status if a read fails

  private:
    std::map<int32_t, std::vector<int32_t>> profile_; // by layer of the model
};

} // namespace rotary
