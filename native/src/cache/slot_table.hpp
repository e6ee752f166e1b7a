// SPDX-License-Identifier: MIT
//
// Slot table of one layer: which expert is in which slot. Who leaves when a slot is wanted is its policy's choice.
// Pure logic: knows neither ggml nor bytes.
// Threading: none of its own; the owner locks.

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

    // Contract: rotary_slots_resolve() in rotary.h. A free slot is taken before any eviction, the lowest first.
    // place() does it for experts whose use has been noted; `keep` are no victims either, if there are slots for all.
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
    void    resize(int32_t n_slots); // fewer: the experts of the last slots leave; more: free slots are added

    // The last slot goes: whom the policy wants least leaves, unless a slot is free, and the last slot's expert comes
    // there. Who that is and where its bytes are to be copied to; expert -1 if nobody's. Nothing may be reserved.
    rotary_load shrink();

    // Reservations: a slot whose bytes are still on their way, ahead of any call that wants them. Its expert does not
    // count as resident, and no call evicts it; the call that wants it gets it as a load into that slot.
    // The slot, its expert evicted; -1 if all slots are reserved or hold experts of `keep`.
    int32_t                      reserve(int32_t expert, const std::vector<int32_t> & keep);
    int32_t                      reserved_for(int32_t expert) const;    // -1 if none
    const std::vector<int32_t> & reserved() const { return reserved_; } // experts
    void end_reservation(int32_t expert, bool resident);                // resident, though not wanted yet; else free

    // The same table as a device keeps it, if its policy can be there: all but the counters, and nothing is reserved.
    bool can_be_on_device() const { return policy_->on_device() != nullptr; }
    void save(const rotary_page_table & to) const;
    void load(const rotary_page_table & from);

  private:
    int32_t take_slot();
    void    leave(int32_t expert);
    void    resize(int32_t first, int32_t n);
    bool    is_reserved(int32_t slot) const;

    std::unique_ptr<policy> policy_;

    std::vector<int32_t> slot_of_;   // [n_expert] slot, -1 absent
    std::vector<int32_t> expert_of_; // [n_slots] expert, -1 free
    std::vector<int64_t> wanted_by_; // [n_expert] the last call_ that wanted this expert: those are held
    std::vector<int32_t> reserved_;  // experts with a reservation; their slots' expert_of_ names them already
    int64_t              call_       = 0;
    int32_t              n_resident_ = 0;
};

} // namespace rotary
