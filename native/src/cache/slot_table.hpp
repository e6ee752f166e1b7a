// SPDX-License-Identifier: MIT
//
// Slot table of one layer: which expert is in which slot. The layer's eviction policy picks the victim when a slot is
// needed.
//
// cache/ makes decisions and moves no bytes: slot tables (here) and a slot table as a device keeps it (page_table.h),
// eviction policies (policies/), what a budget means (budget.hpp), how many slots it gives each layer (division.hpp),
// and moving slots between layers (rebalancer.hpp). Pure logic: it knows neither ggml nor files, and is tested without
// them. Called by store/ (its tier in RAM), link/, model/, exec/, and by capi/ for simulators.
// Threading: none of its own; the owner locks (for a pool's tables, the pool).

#pragma once

#include "cache/page_table.h"
#include "cache/policies/policy.hpp"
#include "rotary.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace rotary {

class slot_table {
  public:
    slot_table(int32_t n_expert, int32_t n_slots, std::unique_ptr<policy> chosen);

    // Contract: rotary_slots_resolve() in rotary.h, with the layer's policy. The lowest free slot is taken before any
    // eviction. place() does not note the use, nor evict `keep`; there must be slots for `ids` and `keep`.
    int32_t resolve(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens, int32_t * slot_ids,
                    rotary_load * loads);
    bool    wants_weights() const { return policy_->wants_weights(); }
    void    note(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens);
    int32_t place(const int32_t * ids, int32_t n_ids, int32_t * slot_ids, rotary_load * loads,
                  const std::vector<int32_t> & keep = {});

    int32_t slot_of(int32_t expert) const { return slot_of_[expert]; }
    int32_t expert_of(int32_t slot) const { return expert_of_[slot]; }
    int32_t n_expert() const { return (int32_t) slot_of_.size(); }
    int32_t n_slots() const { return (int32_t) expert_of_.size(); }
    int32_t n_resident() const { return n_resident_; }
    void    clear();
    void    resize(int32_t n_slots); // fewer: evicts the experts of the last slots; more: adds free slots

    // Remove the last slot: its expert moves to a free slot, or to that of the policy's victim. Returns which expert
    // has to be copied to which slot; expert -1 if none. Nothing may be reserved.
    rotary_load shrink();

    // Reservations are slots for experts that are being prefetched. Such an expert is not resident, and no call evicts
    // it; the call that wants it gets it as a load into that slot.
    // reserve() evicts a victim if no slot is free; -1 if all slots are reserved or hold experts of `keep`.
    int32_t                      reserve(int32_t expert, const std::vector<int32_t> & keep);
    int32_t                      reserved_for(int32_t expert) const;    // -1 if none
    const std::vector<int32_t> & reserved() const { return reserved_; } // experts
    void end_reservation(int32_t expert, bool resident); // resident: the expert has landed; else its slot is free

    // The table on a device (page_table.h), if the policy can run there: no counters, and nothing may be reserved.
    bool can_be_on_device() const { return policy_->on_device() != nullptr; }
    void save(const rotary_page_table & to) const;
    void load(const rotary_page_table & from);

  private:
    int32_t take_slot();
    void    evict(int32_t expert);
    void    resize(int32_t first, int32_t n);
    bool    is_reserved(int32_t slot) const;

    std::unique_ptr<policy> policy_;

    std::vector<int32_t> slot_of_;   // [n_expert] slot; -1: absent
    std::vector<int32_t> expert_of_; // [n_slots] expert; -1: free
    std::vector<int64_t> wanted_by_; // [n_expert] the last call_ that wanted the expert; those of this call_ are held
    std::vector<int32_t> reserved_;  // experts with a reservation; expert_of_ names them, slot_of_ is still -1
    int64_t              call_       = 0;
    int32_t              n_resident_ = 0;
};

} // namespace rotary
