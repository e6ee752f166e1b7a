// SPDX-License-Identifier: MIT
//
// Loaded weights: where the experts of all models in this process lie, and which dense weights the loader copies out of
// the mapping. Pools of several devices share one mapping, so each must know what the others page.
// Threading: any thread.

#pragma once

#include "base/memory.hpp"
#include "store/stored_tensor.hpp"

#include <set>
#include <string>
#include <vector>

namespace rotary {

// Experts of all pools, so that no pool takes another's experts for dense weights.
void                      register_experts(const stored_tensor & tensor);
void                      forget_experts_of(const void * owner);
std::vector<memory_range> all_experts(std::set<std::string> & paths); // adds the files with experts to `paths`

// note_weight() says whether a dense weight of the model being loaded is copied out of the mapping; the loader asks for
// all dense weights, for one device after the other, before any pool has an expert of the model.
void                  note_weight(const std::string & name, bool copied);
std::set<std::string> copied_by_loader();

// Where the weights with these names lie in the mapping that holds `tensor`.
std::vector<memory_range> ranges_of(const std::set<std::string> & names, const stored_tensor & tensor);

} // namespace rotary
