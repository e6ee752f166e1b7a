// SPDX-License-Identifier: MIT
//
// First fill: what slots hold before the first lookup: every expert if each has a slot, else a profile's most wanted.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/paged_model.hpp"

#include <cstdint>
#include <map>
#include <vector>

namespace rotary {

class first_fill {
  public:
    // Layer `il` begins with these experts, the most wanted first; an error status if one is unknown or named twice.
    int32_t set(const paged_model & model, int32_t il, std::vector<int32_t> experts);

    int32_t fill(paged_model & model, const paged_layer & layer) const; // an error status if a read fails

  private:
    std::map<int32_t, std::vector<int32_t>> profile_; // by the model's layer number
};

} // namespace rotary
