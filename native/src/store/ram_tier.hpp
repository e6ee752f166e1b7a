// SPDX-License-Identifier: MIT
//
// RAM tier: slots in RAM that the direct store reads into, in front of an inner device that has memory of its own.
// Experts are copied from here to the device's slots. A batch that misses more experts than its layer has slots here
// bypasses the tier, which it would otherwise flush.
// Threading: none of its own; the pool locks.

#pragma once

#include "cache/slot_table.hpp"
#include "store/stored_tensor.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace rotary {

class ram_tier {
  public:
    struct layer_slots {
        std::vector<const stored_tensor *> tensors; // those read by direct I/O
        int32_t                            n_slots;
        std::unique_ptr<slot_table>        table;   // NULL: the layer has no slots here
    };

    // Allocate the slots of all layers, in what `pinned` returns (page-locked memory, or NULL) if it is set, else in
    // pageable memory. False with errno if the system refuses.
    using allocator = std::function<std::shared_ptr<char>(size_t bytes)>;
    static size_t bytes_for(const std::vector<layer_slots> & layers);
    bool          allocate(std::vector<layer_slots> layers, const allocator & pinned);
    void          free();

    size_t bytes() const { return bytes_; }
    bool   is_pinned() const { return pinned_; }
    bool   contains(const char * address) const { return address >= memory_.get() && address < memory_.get() + bytes_; }

    // A layer's slots; NULL if it has none.
    slot_table * table(int32_t layer) const {
        return layer < (int32_t) layers_.size() ? layers_[layer].get() : nullptr;
    }

    // A tensor's part of a slot. slot_of(): of the slot that `expert` is in, NULL if it is in none.
    char * slot(const stored_tensor & tensor, int32_t slot) const {
        return tensors_[tensor.index].first + tensors_[tensor.index].stride * slot;
    }
    char * slot_of(const stored_tensor & tensor, int32_t expert) const;

    void clear(); // every slot is free again

  private:
    struct tensor_slots {
        char * first  = nullptr; // slot 0
        size_t stride = 0;       // bytes from one slot to the next
    };

    std::shared_ptr<char>                    memory_;
    size_t                                   bytes_  = 0;
    bool                                     pinned_ = false;
    std::vector<std::unique_ptr<slot_table>> layers_;  // by the layer's index
    std::vector<tensor_slots>                tensors_; // by the tensor's index
};

} // namespace rotary
