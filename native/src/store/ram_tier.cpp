// SPDX-License-Identifier: MIT
//
// RAM tier. See ram_tier.hpp.

#include "store/ram_tier.hpp"

#include "store/staging_area.hpp"

#include <algorithm>
#include <sys/mman.h>

namespace rotary {

// Call place(tensor, address, stride) for each tensor's slots, laid out from `begin` on; returns the bytes they take.
// Slots are aligned as read targets of direct_store::demand().
template <typename function>
static size_t lay_out(const std::vector<ram_tier::layer_slots> & layers, uintptr_t begin, const function & place) {
    uintptr_t at = begin;
    for (const ram_tier::layer_slots & layer : layers) {
        if (!layer.table) {
            continue;
        }
        for (const stored_tensor * tensor : layer.tensors) {
            const size_t align  = tensor->file->alignment();
            const size_t phase  = tensor->offset % align;
            const size_t stride = tensor->expert_bytes + (phase != 0 ? align : 0);
            at                  = (at + align - 1) / align * align + phase;
            place(*tensor, (char *) at, stride);
            at += stride * layer.n_slots + align;
        }
    }
    return at - begin;
}

size_t ram_tier::bytes_for(const std::vector<layer_slots> & layers) {
    const size_t bytes = lay_out(layers, 0, [](const stored_tensor &, char *, size_t) {});
    return bytes != 0 ? bytes + staging_area::unit : 0;
}

bool ram_tier::allocate(std::vector<layer_slots> layers, const allocator & pinned) {
    const size_t bytes = bytes_for(layers);
    free();
    memory_ = pinned ? pinned(bytes) : nullptr;
    pinned_ = memory_ != nullptr;
    if (!memory_) {
        void * plain = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (plain == MAP_FAILED) {
            return false;
        }
        memory_.reset((char *) plain, [bytes](char * memory) { munmap(memory, bytes); });
    }
    bytes_ = bytes;
    // Begin at a whole unit, so that the layout takes the bytes that bytes_for() counted.
    const uintptr_t begin =
        ((uintptr_t) memory_.get() + staging_area::unit - 1) / staging_area::unit * staging_area::unit;
    lay_out(layers, begin, [this](const stored_tensor & tensor, char * first, size_t stride) {
        tensors_.resize(std::max(tensors_.size(), (size_t) tensor.index + 1));
        tensors_[tensor.index] = { first, stride };
    });
    for (layer_slots & each : layers) {
        layers_.push_back(std::move(each.table));
    }
    return true;
}

void ram_tier::free() {
    layers_.clear();
    tensors_.clear();
    memory_.reset();
    bytes_  = 0;
    pinned_ = false;
}

char * ram_tier::slot_of(const stored_tensor & tensor, int32_t expert) const {
    const slot_table * slots = table(tensor.layer);
    const int32_t      index = slots != nullptr ? slots->slot_of(expert) : -1;
    return index >= 0 ? slot(tensor, index) : nullptr;
}

void ram_tier::clear() {
    for (const auto & each : layers_) {
        if (each) {
            each->clear();
        }
    }
}

} // namespace rotary
