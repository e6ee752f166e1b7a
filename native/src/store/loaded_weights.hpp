// SPDX-License-Identifier: MIT
//
// Loaded weights: what this process knows of all models that llama.cpp loads, whichever pool they belong to: where experts
// lie, and which dense weights the loader copies out of the mapping. Pools of several devices share one mapping, and what
// one of them takes over concerns the others.
// Threading: any thread.

#pragma once

#include "base/memory.hpp"
#include "store/stored_tensor.hpp"

#include <set>
#include <string>
#include <vector>

namespace rotary {

// Known to all pools, so that none takes another's experts for dense weights.
void                      register_experts(const stored_tensor & tensor);
void                      forget_experts_of(const void * owner);
std::vector<memory_range> all_experts(std::set<std::string> & paths); // and the files that have experts

// A dense weight of the model that is being loaded, and whether it is copied out of the mapping. The loader asks for all of
// them before any pool has an expert of the model, and for several devices in turn.
void                  note_weight(const std::string & name, bool copied);
std::set<std::string> copied_by_loader();

// Where the weights of these names lie in the mapping that `tensor` is in.
std::vector<memory_range> ranges_of(const std::set<std::string> & names, const stored_tensor & tensor);

} // namespace rotary
