// SPDX-License-Identifier: MIT
//
// Read targets. See read_targets.hpp.

#include "model/read_targets.hpp"

#include <algorithm>
#include <cstring>

namespace rotary {

char * read_targets::at(const paged_tensor & tensor, int32_t slot) const {
    return experts_.layer_of(tensor).reads_into_slots ? (char *) tensor.slots->data + tensor.slots->nb[2] * slot
                                                      : store_.ram().slot(tensor, slot);
}

bool read_targets::is_resident(const paged_layer & layer, int32_t expert) const {
    const slot_table * ram = store_.ram().table(layer.index);
    return layer.table->slot_of(expert) >= 0 || (ram != nullptr && ram->slot_of(expert) >= 0);
}

std::vector<int32_t> read_targets::slots_for(const paged_layer & layer, const std::vector<rotary_load> & loads) {
    std::vector<int32_t> slots;
    for (const rotary_load & load : loads) {
        slots.push_back(layer.reads_into_slots ? load.slot : to_staging);
    }
    slot_table * ram = store_.ram().table(layer.index);
    if (ram == nullptr || loads.empty()) {
        return slots;
    }
    std::vector<int32_t> experts;
    for (const rotary_load & load : loads) {
        experts.push_back(load.expert);
    }
    const auto n = (int32_t) experts.size();
    if (n + (int32_t) ram->reserved().size() > ram->n_slots()) {
        commit(layer, true);
    }
    std::vector<rotary_load> absent(ram->n_slots());
    const int32_t            n_absent = ram->resolve(experts.data(), nullptr, n, 1, slots.data(), absent.data());
    if (n_absent < 0) { // more experts than slots: bypass the tier, but for those it has
        for (int32_t i = 0; i < n; i++) {
            slots[i] = ram->slot_of(experts[i]) >= 0 ? in_ram : to_staging;
        }
        return slots;
    }
    for (int32_t i = 0; i < n; i++) {
        const bool reads = std::any_of(absent.begin(), absent.begin() + n_absent,
                                       [&](const rotary_load & load) { return load.expert == experts[i]; });
        slots[i]         = reads ? slots[i] : in_ram;
    }
    stats_.update([&](rotary_stats & totals) { totals.ram_hits += n - n_absent; });
    return slots;
}

// ---- prefetches

char * read_targets::reserve(const stored_tensor & tensor, int32_t expert, const std::vector<int32_t> & keep) {
    const paged_layer & layer = experts_.layer_of(tensor);
    slot_table &        slots = *table(layer);
    int32_t             slot  = slots.reserved_for(expert);
    // A wrong prediction occupies a slot until its layer is looked up, so reserve no more than one token uses.
    const int32_t max_reserved = std::min(layer.n_expert_used, (slots.n_slots() - layer.n_expert_used) / 2);
    if (slot < 0 && (int32_t) slots.reserved().size() < max_reserved) {
        slot = slots.reserve(expert, keep);
    }
    return slot < 0 ? nullptr : at(static_cast<const paged_tensor &>(tensor), slot);
}

void read_targets::commit(const paged_layer & layer, bool wait) {
    slot_table * slots = table(layer);
    if (slots == nullptr) {
        return;
    }
    direct_store &             direct   = *store_.direct();
    const std::vector<int32_t> reserved = slots->reserved();
    for (const int32_t expert : reserved) {
        bool in_flight = false, whole = true;
        for (const paged_tensor * tensor : layer.tensors) {
            if (wait) {
                direct.finish(*tensor, expert);
            }
            in_flight = in_flight || direct.in_flight(*tensor, expert);
            whole     = whole && (!tensor->direct_io || direct.landed_at(*tensor, expert) != nullptr);
        }
        if (in_flight) {
            continue;
        }
        for (const paged_tensor * tensor : layer.tensors) {
            direct.drop(*tensor, expert);
            if (whole && !tensor->direct_io && layer.reads_into_slots) {
                memcpy(at(*tensor, slots->reserved_for(expert)), tensor->at(expert), tensor->expert_bytes);
            }
        }
        slots->end_reservation(expert, whole);
    }
}

} // namespace rotary
