// SPDX-License-Identifier: MIT
//
// RAM tier: slots in RAM that the direct store reads into, in front of an inner device that has memory of its own. Experts
// are copied from here to the device's slots. Prompts that want more experts than it has slots pass it by, so that they do
// not flood it.
// Threading: none of its own; the pool locks.

#pragma once

#include "cache/slot_table.hpp"
#include "store/stored_tensor.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace rotary {

class ram_tier {
  public:
    struct layer_slots {
        std::vector<const stored_tensor *> tensors; // that are read by direct I/O
        int32_t                            n_slots;
        std::unique_ptr<slot_table>        table;   // NULL: the layer has no slots here
    };

    // Allocates the slots of all layers; `pinned` gives page-locked memory, or NULL, and is not asked if it is empty. False
    // if the system refuses the memory, with errno.
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

    // Where a tensor's part of a slot is, and of the slot that an expert has, NULL if it has none.
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
