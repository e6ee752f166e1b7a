// SPDX-License-Identifier: MIT
//
// Read targets: slots that the direct store reads straight into. For a host inner device these are the slots that it
// computes from, where they have the file's layout; for a device with memory of its own, the slots of the tier in RAM.
// What is prefetched into a read target is committed once it has landed.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/catalogue.hpp"
#include "stats/statistics.hpp"
#include "store/expert_store.hpp"

#include <cstdint>
#include <vector>

namespace rotary {

class read_targets {
  public:
    read_targets(const catalogue & experts, expert_store & store, statistics & stats) :
        experts_(experts), store_(store), stats_(stats) {}

    // The target's slot for each expert that is to be loaded into the inner device's slots, or one of these constants.
    // The load counts as a use in the tier in RAM.
    static constexpr int32_t to_staging = -1, in_ram = -2;
    std::vector<int32_t>     slots_for(const paged_layer & layer, const std::vector<rotary_load> & loads);

    bool   exist(const paged_layer & layer) const { return table(layer) != nullptr; }
    char * at(const paged_tensor & tensor, int32_t slot) const;

    // Whether an expert is in the inner device's slots or in the tier in RAM.
    bool is_resident(const paged_layer & layer, int32_t expert) const;

    // Reserve a target for a prefetch, evicting none of `keep`; NULL if it has to go to the staging area.
    char * reserve(const stored_tensor & tensor, int32_t expert, const std::vector<int32_t> & keep);

    // Make experts that have landed whole in a layer's targets resident, and free the targets of those that landed in
    // part. Reads in flight go on; with `wait`, they are waited for first.
    void commit(const paged_layer & layer, bool wait);

  private:
    slot_table * table(const paged_layer & layer) const {
        return layer.reads_into_slots ? layer.table.get() : store_.ram().table(layer.index);
    }

    const catalogue & experts_;
    expert_store &    store_;
    statistics &      stats_;
};

} // namespace rotary
