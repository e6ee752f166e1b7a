// SPDX-License-Identifier: MIT
//
// Slot memory: the inner device's memory for slots. It does not know which expert is in which slot.
// Threading: none of its own; the pool locks.

#pragma once

#include "model/catalogue.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace rotary {

class slot_memory {
  public:
    slot_memory(ggml_backend_dev_t inner, bool repack);

    bool inner_is_host() const { return inner_is_host_; }

    // The layout of a tensor's slots: with `repack`, the repacked one in which stock llama.cpp would load the weight,
    // if the inner device has one; else plain.
    ggml_backend_buffer_type_t layout_of(const paged_tensor & tensor) const;
    bool                       is_plain(const paged_tensor & tensor) const;

    // Allocate each layer's n_allocated slots, except on the mapped path. False if there is no memory.
    bool allocate(const catalogue & experts);
    void free();

    // In host memory: zero a layer's slots [first, last) so that their pages exist, since first faults during decode
    // cost more than the copies; give them back to the system, after which they read as zeros; copy a slot.
    void touch(const paged_layer & layer, int32_t first, int32_t last) const;
    void give_back(const paged_layer & layer, int32_t first, int32_t last) const;
    void copy(const paged_layer & layer, int32_t from, int32_t to) const;

    uint64_t generation() const { return generation_; } // changes whenever slots move
    bool     is_allocated() const { return !buffers_.empty(); }

  private:
    ggml_backend_buffer_t allocate_read_targets(const catalogue & experts, ggml_backend_buffer_type_t buft) const;

    ggml_backend_dev_t                   inner_;
    bool                                 inner_is_host_;
    bool                                 repack_;
    std::vector<ggml_context_ptr>        contexts_; // the slot tensors, by buffer type
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<std::shared_ptr<void>>   known_;    // keeps the buffers out of host_memory_promised()
    uint64_t                             generation_ = 0;
};

} // namespace rotary
