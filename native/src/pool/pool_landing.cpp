// SPDX-License-Identifier: MIT
//
// Pool: the slots that the direct store reads straight into. See pool.hpp.
//
// On a host inner device these are the slots it computes from, where they have the file's layout. In front of a device
// with memory of its own they are a tier of their own in RAM, from which experts are copied to the device's slots; the
// same table decides who leaves. Prompts pass it by, so that they do not flood it.

#include "base/error.hpp"
#include "base/memory.hpp"
#include "pool/pool.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

namespace rotary {

// A slot for an expert that is read ahead; NULL if it has to go through the staging area.
char * pool::place_for(const paged_tensor & tensor, int32_t expert) {
    paged_layer & layer = *by_data_.at(tensor.data).layer;
    slot_table &  table = *layer.landing;
    int32_t       slot  = table.reserved_for(expert);
    // A wrong guess costs a slot until its layer is looked up; no more of them than a token wants.
    const int32_t most = std::min(layer.n_expert_used, (table.n_slots() - layer.n_expert_used) / 2);
    if (slot < 0 && (int32_t) table.reserved().size() < most) {
        std::vector<int32_t> keep;
        for (const std::vector<guess> & guesses : layer.foretold) {
            for (const guess & each : guesses) {
                keep.push_back(each.expert);
            }
        }
        slot = table.reserve(expert, keep);
    }
    return slot < 0 ? nullptr : tensor.landing_at(slot);
}

void pool::settle(paged_layer & layer, bool wait) {
    if (layer.landing == nullptr) {
        return;
    }
    const std::vector<int32_t> reserved = layer.landing->reserved();
    for (const int32_t expert : reserved) {
        bool flying = false, whole = true;
        for (const paged_tensor * tensor : layer.tensors) {
            if (wait) {
                direct_->finish(*tensor, expert);
            }
            flying = flying || direct_->in_flight(*tensor, expert);
            whole  = whole && (!tensor->direct || direct_->landed_at(*tensor, expert) != nullptr);
        }
        if (flying) {
            continue;
        }
        for (const paged_tensor * tensor : layer.tensors) {
            direct_->drop(*tensor, expert);
            if (whole && !tensor->direct && layer.landing == layer.table.get()) {
                memcpy(tensor->landing_at(layer.landing->reserved_for(expert)), tensor->expert_data(expert),
                       tensor->expert_bytes);
            }
        }
        layer.landing->end_reservation(expert, whole);
    }
}

bool pool::reads_directly(const paged_layer & layer) {
    return std::any_of(layer.tensors.begin(), layer.tensors.end(), [](const auto * tensor) { return tensor->direct; });
}

bool pool::reads_whole_sectors(const paged_layer & layer) {
    return reads_directly(layer) &&
           std::all_of(layer.tensors.begin(), layer.tensors.end(), [](const paged_tensor * tensor) {
               return !tensor->direct || tensor->expert_bytes % tensor->file->alignment() == 0;
           });
}

// ---- slots in RAM, in front of an inner device that has memory of its own

// What is available less a margin, page-locked if that may be. Without it, or where experts are no whole sectors, each
// miss is read from the disk.
void pool::allocate_ram_tier() {
    const host_memory memory = host_memory_now();
    ram_.reset();
    ram_bytes_  = 0;
    ram_locked_ = false;
    if (!direct_ || inner_is_host_) {
        return;
    }
    const uint64_t margin = host_margin(memory.total);
    uint64_t       bytes  = memory.available > margin ? memory.available - margin : 0;
    budget         most;
    const char *   asked = getenv("ROTARY_RAM");
    if (asked != nullptr && budget_parse(asked, most) && most.what == budget::kind::bytes) {
        bytes = std::min(bytes, (uint64_t) most.value);
    }
    const std::vector<int32_t> n_slots = budget_slots(bytes, layer_sizes());
    const auto                 history = routing_history_new((int32_t) layers_.size());
    const auto                 lay_out = [&](uintptr_t begin, bool for_good) {
        uintptr_t at = begin;
        for (size_t i = 0; i < n_slots.size(); i++) {
            if (!layers_[i]->table || !reads_whole_sectors(*layers_[i])) {
                continue;
            }
            for (paged_tensor * tensor : layers_[i]->tensors) {
                if (!tensor->direct) {
                    continue; // in RAM as it is
                }
                const size_t align  = tensor->file->alignment();
                const size_t phase  = tensor->offset % align;
                const size_t stride = tensor->expert_bytes + (phase != 0 ? align : 0);
                at                  = (at + align - 1) / align * align + phase;
                if (for_good) {
                    tensor->landing       = (char *) at;
                    tensor->landing_bytes = stride;
                }
                at += stride * n_slots[i] + align;
            }
            if (for_good) {
                // It sees the other tier's misses alone, which are no whole routings.
                layers_[i]->ram     = new_table(i, n_slots[i], best_on_device, history);
                layers_[i]->landing = layers_[i]->ram.get();
            }
        }
        return at - begin;
    };
    const auto none = [&](const std::string & reason) {
        notice(format("%s: no slots in RAM, so what %s does not hold is read from the disk each time: %s",
                      config.model.c_str(), ggml_backend_dev_name(inner_), reason.c_str()));
    };
    const size_t size = lay_out(0, false);
    const bool   wanted =
        std::any_of(layers_.begin(), layers_.end(), [](const auto & layer) { return layer->table != nullptr; });
    if (size == 0) {
        if (wanted && n_slots.empty()) {
            none(format("one token's experts do not fit into %s", mib(bytes).c_str()));
        } else if (wanted) {
            none("experts are no whole sectors of the file");
        }
        return;
    }
    std::string reason;
    if (link_ && may_lock(size, reason)) {
        const link::locked locked = link_->host_memory(size + staging_area::unit, reason);
        ram_                      = std::static_pointer_cast<char>(locked.memory);
        ram_locked_               = ram_ != nullptr;
    }
    if (!ram_) {
        void * plain =
            mmap(nullptr, size + staging_area::unit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (plain == MAP_FAILED) {
            none(format("the system refuses %s: %s", mib(size).c_str(), strerror(errno)));
            return;
        }
        ram_.reset((char *) plain, [size](char * it) { munmap(it, size + staging_area::unit); });
    }
    ram_bytes_ = size + staging_area::unit;
    // Rounded up here, so that the layout is the one that was measured.
    lay_out(((uintptr_t) ram_.get() + staging_area::unit - 1) / staging_area::unit * staging_area::unit, true);
    if (link_ && !ram_locked_) {
        notice(format("%s: slots in RAM are not page-locked, so copies from them cost the host's time: %s",
                      config.model.c_str(), reason.c_str()));
    }
    GGML_LOG_INFO("rotary: %s: %s of slots in RAM in front of %s%s\n", config.model.c_str(), mib(size).c_str(),
                  ggml_backend_dev_name(inner_), ram_locked_ ? ", page-locked" : "");
}

std::vector<int32_t> pool::landing_slots(paged_layer & layer, const std::vector<rotary_load> & loads) {
    std::vector<int32_t> slots;
    for (const rotary_load & load : loads) {
        slots.push_back(layer.landing == nullptr ? to_staging : load.slot);
    }
    if (!layer.ram || loads.empty()) {
        return slots;
    }
    std::vector<int32_t> experts;
    for (const rotary_load & load : loads) {
        experts.push_back(load.expert);
    }
    const int32_t n = (int32_t) experts.size();
    if (n + (int32_t) layer.ram->reserved().size() > layer.ram->n_slots()) {
        settle(layer, true);
    }
    std::vector<rotary_load> absent(layer.ram->n_slots());
    const int32_t            n_absent = layer.ram->resolve(experts.data(), nullptr, n, 1, slots.data(), absent.data());
    if (n_absent < 0) { // more than there are slots: past them
        for (int32_t i = 0; i < n; i++) {
            slots[i] = layer.ram->slot_of(experts[i]) >= 0 ? in_ram : to_staging;
        }
        return slots;
    }
    for (int32_t i = 0; i < n; i++) {
        const bool reads = std::any_of(absent.begin(), absent.begin() + n_absent,
                                       [&](const rotary_load & load) { return load.expert == experts[i]; });
        slots[i]         = reads ? slots[i] : in_ram;
    }
    count_ram_hits(n - n_absent);
    return slots;
}

} // namespace rotary
