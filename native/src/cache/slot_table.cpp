// SPDX-License-Identifier: MIT
//
// Slot table. See slot_table.hpp.

#include "cache/slot_table.hpp"

#include <algorithm>

namespace rotary {

slot_table::slot_table(int32_t n_expert, int32_t n_slots, std::unique_ptr<policy> chosen) :
    policy_(std::move(chosen)), slot_of_(n_expert, -1), expert_of_(n_slots, -1), wanted_by_(n_expert, 0) {}

int32_t slot_table::resolve(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens,
                            int32_t * slot_ids, rotary_load * loads) {
    const int32_t n_ids = n_used * n_tokens;
    if (std::any_of(ids, ids + n_ids, [&](int32_t id) { return id < 0 || id >= n_expert(); })) {
        return ROTARY_ERR_ARG;
    }
    call_++;
    int32_t n_distinct = 0;
    for (int32_t i = 0; i < n_ids; i++) {
        n_distinct += wanted_by_[ids[i]] != call_;
        wanted_by_[ids[i]] = call_;
    }
    const auto held =
        std::count_if(reserved_.begin(), reserved_.end(), [&](int32_t expert) { return wanted_by_[expert] != call_; });
    if (n_distinct > n_slots() - (int32_t) held) {
        return ROTARY_ERR_ARG;
    }
    note(ids, weights, n_used, n_tokens);
    return place(ids, n_ids, slot_ids, loads);
}

void slot_table::note(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens) {
    policy_->note(ids, weights, n_used, n_tokens);
}

int32_t slot_table::place(const int32_t * ids, int32_t n_ids, int32_t * slot_ids, rotary_load * loads,
                          const std::vector<int32_t> & keep) {
    call_++;
    for (int32_t i = 0; i < n_ids; i++) {
        wanted_by_[ids[i]] = call_;
    }
    for (const int32_t each : keep) {
        wanted_by_[each] = call_;
    }
    int32_t n_loads = 0;
    for (int32_t i = 0; i < n_ids; i++) {
        const int32_t expert = ids[i];
        if (slot_of_[expert] < 0) {
            int32_t slot    = reserved_for(expert);
            int32_t evicted = -1; // for a reserved slot, reserve() has evicted already
            if (slot >= 0) {
                reserved_.erase(std::find(reserved_.begin(), reserved_.end(), expert));
            } else {
                slot             = take_slot();
                evicted          = expert_of_[slot];
                expert_of_[slot] = expert;
            }
            slot_of_[expert] = slot;
            n_resident_++;
            policy_->enter(expert, true);
            loads[n_loads++] = { expert, slot, evicted };
        }
        slot_ids[i] = slot_of_[expert];
    }
    return n_loads;
}

// A free slot, made by eviction if need be; -1 if all are reserved or hold experts that this call wants.
int32_t slot_table::take_slot() {
    std::vector<int32_t> candidates;
    for (int32_t slot = 0; slot < n_slots(); slot++) {
        const int32_t expert = expert_of_[slot];
        if (expert < 0) {
            return slot;
        }
        if (wanted_by_[expert] != call_ && !is_reserved(slot)) {
            candidates.push_back(expert);
        }
    }
    if (candidates.empty()) {
        return -1;
    }
    const int32_t expert = policy_->choose(candidates);
    const int32_t slot   = slot_of_[expert];
    evict(expert);
    return slot;
}

// expert_of_ still names the expert: the caller overwrites it.
void slot_table::evict(int32_t expert) {
    slot_of_[expert] = -1;
    n_resident_--;
    policy_->leave(expert);
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
    if (resident) {
        n_resident_++;
        policy_->enter(expert, false);
    }
}

void slot_table::clear() {
    reserved_.clear();
    resize(0, n_slots());
}

void slot_table::resize(int32_t n) {
    resize(n, n);
}

// Free all slots from `first` on, and change their number to n.
void slot_table::resize(int32_t first, int32_t n) {
    for (int32_t slot = first; slot < n_slots(); slot++) {
        const int32_t expert = expert_of_[slot];
        if (expert >= 0 && slot_of_[expert] == slot) {
            evict(expert);
        }
        expert_of_[slot] = -1;
    }
    const bool other = n != n_slots();
    expert_of_.resize(n, -1);
    if (other) {
        policy_->resize(n);
    }
}

rotary_load slot_table::shrink() {
    call_++;
    const int32_t last   = n_slots() - 1;
    const int32_t hole   = take_slot();
    const int32_t expert = hole == last ? -1 : expert_of_[last];
    expert_of_[hole]     = expert;
    expert_of_[last]     = -1;
    if (expert >= 0) {
        slot_of_[expert] = hole;
    }
    resize(last);
    return { expert, hole, -1 };
}

// ---- on a device

void slot_table::save(const rotary_page_table & to) const {
    const valued_policy & values = *policy_->on_device();
    std::copy(slot_of_.begin(), slot_of_.end(), to.slot_of);
    std::copy(expert_of_.begin(), expert_of_.end(), to.expert_of);
    std::copy(values.value.begin(), values.value.end(), to.value);
    std::copy(wanted_by_.begin(), wanted_by_.end(), to.wanted_by);
    to.state->clock        = values.clock;
    to.state->growth       = values.growth;
    to.state->unused_value = values.unused_value;
    to.state->call         = call_;
    to.state->n_resident   = n_resident_;
    to.state->n_pages = to.state->n_predicted = to.state->n_prefetches = 0;
}

void slot_table::load(const rotary_page_table & from) {
    valued_policy & values = *policy_->on_device();
    std::copy_n(from.slot_of, n_expert(), slot_of_.begin());
    std::copy_n(from.expert_of, n_slots(), expert_of_.begin());
    std::copy_n(from.value, n_expert(), values.value.begin());
    std::copy_n(from.wanted_by, n_expert(), wanted_by_.begin());
    values.clock        = from.state->clock;
    values.unused_value = from.state->unused_value;
    call_               = from.state->call;
    n_resident_         = from.state->n_resident;
}

} // namespace rotary
