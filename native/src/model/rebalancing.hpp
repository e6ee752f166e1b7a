// SPDX-License-Identifier: MIT
//
// Rebalancing: moves slots between layers while the model runs, as cache/rebalancer.hpp proposes.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/paged_model.hpp"

namespace rotary {

// Begin anew with the slots that layers have now.
void start_rebalancing(paged_model & model);

// Take the proposed step, if any. Call between graphs; `user` is the inner backend that computes from the slots.
void rebalance(paged_model & model, ggml_backend_t user);

} // namespace rotary
