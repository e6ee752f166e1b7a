// SPDX-License-Identifier: MIT
//
// Configuration of a paged model, from rotary_pool_open() or the environment; that of prefetch is in
// prefetch/predictions.hpp.

#pragma once

#include "cache/budget.hpp"
#include "cache/policies/policy.hpp"
#include "link/pinned_store.hpp"
#include "rotary.h"

#include <cstdint>
#include <string>

namespace rotary {

struct model_config {
    std::string           name = "model";              // for messages
    budget                wanted;                      // changes only between graphs
    std::string           budget_text          = "auto";
    uint64_t              margin_bytes         = 0;    // 0: the default
    bool                  repack               = true;
    bool                  compute_from_mapping = true; // batches that want more experts than there are slots
    rotary_store          store                = ROTARY_STORE_AUTO;
    uint64_t              staging_bytes        = 0;    // 0: the default
    bool                  adaptive             = true; // slots are rebalanced between layers
    pin_policy            pin                  = pin_policy::automatic;
    std::string           policy               = automatic_policy; // name of the eviction policy
    const rotary_policy * own_policy           = nullptr;          // used instead of `policy` if not NULL
};

} // namespace rotary
