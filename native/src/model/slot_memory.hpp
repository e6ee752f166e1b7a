// SPDX-License-Identifier: MIT
//
// Slot memory: the inner device's memory for slots. Says nothing of which expert is in which slot.
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

    // The layout a tensor's slots have: a repacked one if the inner device would use one for this weight, as stock
    // llama.cpp then loads it so; else plain.
    ggml_backend_buffer_type_t layout_of(const paged_tensor & tensor) const;
    bool                       is_plain(const paged_tensor & tensor) const;

    // Slots for all layers that are not on the mapped path, as many as each layer's n_allocated. False if there is no memory.
    bool allocate(const catalogue & experts);
    void free();

    // In host memory: have the pages of a layer's slots [first, last) now, since first faults cost more than the copies when
    // they come during decode; give them back to the system, after which they read as zeros; copy one slot to another.
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
    std::vector<ggml_context_ptr>        contexts_; // of the slot tensors, one for each buffer type
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<std::shared_ptr<void>>   known_;    // while the buffers live: host_memory_promised()
    uint64_t                             generation_ = 0;
};

} // namespace rotary
