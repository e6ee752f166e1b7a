// SPDX-License-Identifier: MIT
//
// Slot table with least recently used eviction, and its C API. See slots.hpp.

#include "slots.hpp"

#include <algorithm>
#include <memory>
#include <new>

namespace rotary {

slot_table::slot_table(int32_t n_expert, int32_t n_slots) :
    slot_of_(n_expert, -1), expert_of_(n_slots, -1), last_use_(n_slots, 0), wanted_by_(n_expert, 0) {}

int32_t slot_table::resolve(const int32_t * ids, int32_t n_ids, int32_t * slot_ids, rotary_load * loads) {
    call_++;
    int32_t n_distinct = 0;
    for (int32_t i = 0; i < n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= n_expert()) {
            return ROTARY_ERR_ARG;
        }
        if (wanted_by_[ids[i]] != call_) {
            wanted_by_[ids[i]] = call_;
            n_distinct++;
        }
    }
    const auto held =
        std::count_if(reserved_.begin(), reserved_.end(), [&](int32_t expert) { return wanted_by_[expert] != call_; });
    if (n_distinct > n_slots() - (int32_t) held) {
        return ROTARY_ERR_ARG;
    }

    int32_t n_loads = 0;
    for (int32_t i = 0; i < n_ids; i++) {
        const int32_t expert = ids[i];
        if (slot_of_[expert] < 0) {
            int32_t slot    = reserved_for(expert);
            int32_t evicted = -1; // if ever, when the slot was reserved
            if (slot >= 0) {
                end_reservation(expert, true);
            } else {
                slot    = take_slot();
                evicted = expert_of_[slot];
                if (evicted >= 0) {
                    slot_of_[evicted] = -1;
                } else {
                    n_resident_++;
                }
                slot_of_[expert] = slot;
                expert_of_[slot] = expert;
            }
            loads[n_loads++] = { expert, slot, evicted };
        }
        slot_ids[i]            = slot_of_[expert];
        last_use_[slot_ids[i]] = ++clock_;
    }
    return n_loads;
}

// The caller has checked that this call wants no more experts than there are slots, so a slot is always found.
int32_t slot_table::take_slot() {
    int32_t best = -1;
    for (int32_t slot = 0; slot < n_slots(); slot++) {
        const int32_t expert = expert_of_[slot];
        if (expert < 0) {
            return slot;
        }
        if (wanted_by_[expert] != call_ && (best < 0 || last_use_[slot] < last_use_[best]) && !is_reserved(slot)) {
            best = slot;
        }
    }
    return best;
}

// ---- reservations

bool slot_table::is_reserved(int32_t slot) const {
    return expert_of_[slot] >= 0 && slot_of_[expert_of_[slot]] < 0;
}

int32_t slot_table::reserve(int32_t expert, const std::vector<int32_t> & keep) {
    call_++;
    for (const int32_t each : keep) {
        wanted_by_[each] = call_;
    }
    const int32_t slot = take_slot();
    if (slot >= 0) {
        if (expert_of_[slot] >= 0) {
            slot_of_[expert_of_[slot]] = -1;
            n_resident_--;
        }
        expert_of_[slot] = expert;
        reserved_.push_back(expert);
    }
    return slot;
}

int32_t slot_table::reserved_for(int32_t expert) const {
    if (std::find(reserved_.begin(), reserved_.end(), expert) == reserved_.end()) {
        return -1;
    }
    return (int32_t) (std::find(expert_of_.begin(), expert_of_.end(), expert) - expert_of_.begin());
}

void slot_table::end_reservation(int32_t expert, bool resident) {
    const int32_t slot = reserved_for(expert);
    reserved_.erase(std::find(reserved_.begin(), reserved_.end(), expert));
    slot_of_[expert] = resident ? slot : -1;
    expert_of_[slot] = resident ? expert : -1;
    last_use_[slot]  = --unused_;
    n_resident_ += resident;
}

void slot_table::clear() {
    std::fill(slot_of_.begin(), slot_of_.end(), -1);
    std::fill(expert_of_.begin(), expert_of_.end(), -1);
    std::fill(last_use_.begin(), last_use_.end(), 0);
    reserved_.clear();
    n_resident_ = 0;
}

void slot_table::resize(int32_t n) {
    for (int32_t slot = n; slot < n_slots(); slot++) {
        if (expert_of_[slot] >= 0) {
            slot_of_[expert_of_[slot]] = -1;
            n_resident_--;
        }
    }
    expert_of_.resize(n, -1);
    last_use_.resize(n, 0);
}

// ---- the same on a device

void slot_table::save(const rotary_page_table & to) const {
    std::copy(slot_of_.begin(), slot_of_.end(), to.slot_of);
    std::copy(expert_of_.begin(), expert_of_.end(), to.expert_of);
    std::copy(last_use_.begin(), last_use_.end(), to.last_use);
    std::copy(wanted_by_.begin(), wanted_by_.end(), to.wanted_by);
    to.state->clock      = clock_;
    to.state->unused     = unused_;
    to.state->call       = call_;
    to.state->n_resident = n_resident_;
    to.state->n_pages = to.state->n_foretold = to.state->n_ahead = 0;
}

void slot_table::load(const rotary_page_table & from) {
    std::copy_n(from.slot_of, n_expert(), slot_of_.begin());
    std::copy_n(from.expert_of, n_slots(), expert_of_.begin());
    std::copy_n(from.last_use, n_slots(), last_use_.begin());
    std::copy_n(from.wanted_by, n_expert(), wanted_by_.begin());
    clock_      = from.state->clock;
    unused_     = from.state->unused;
    call_       = from.state->call;
    n_resident_ = from.state->n_resident;
}

} // namespace rotary

// C API

struct rotary_slots : rotary::slot_table {
    using slot_table::slot_table;
};

rotary_slots * rotary_slots_new(int32_t n_expert, int32_t n_slots) {
    if (n_expert < 1 || n_slots < 1 || n_slots > n_expert) {
        return nullptr;
    }
    return new (std::nothrow) rotary_slots(n_expert, n_slots);
}

void rotary_slots_free(rotary_slots * slots) {
    delete slots;
}

int32_t rotary_slots_resolve(rotary_slots * slots, const int32_t * ids, int32_t n_ids, int32_t * slot_ids,
                             rotary_load * loads) {
    return slots->resolve(ids, n_ids, slot_ids, loads);
}

int32_t rotary_slots_slot_of(const rotary_slots * slots, int32_t expert) {
    return expert < 0 || expert >= slots->n_expert() ? -1 : slots->slot_of(expert);
}

int32_t rotary_slots_expert_of(const rotary_slots * slots, int32_t slot) {
    return slot < 0 || slot >= slots->n_slots() ? -1 : slots->expert_of(slot);
}

int32_t rotary_slots_n_resident(const rotary_slots * slots) {
    return slots->n_resident();
}

void rotary_slots_clear(rotary_slots * slots) {
    slots->clear();
}

int32_t rotary_slots_reserve(rotary_slots * slots, int32_t expert, const int32_t * keep, int32_t n_keep) {
    const auto known = [&](int32_t each) {
        return each >= 0 && each < slots->n_expert();
    };
    if (!known(expert) || slots->slot_of(expert) >= 0 || slots->reserved_for(expert) >= 0 ||
        !std::all_of(keep, keep + n_keep, known)) {
        return ROTARY_ERR_ARG;
    }
    const int32_t slot = slots->reserve(expert, { keep, keep + n_keep });
    return slot >= 0 ? slot : ROTARY_ERR_BUDGET;
}

int32_t rotary_slots_end_reservation(rotary_slots * slots, int32_t expert, bool resident) {
    if (slots->reserved_for(expert) < 0) {
        return ROTARY_ERR_ARG;
    }
    slots->end_reservation(expert, resident);
    return ROTARY_OK;
}
