// SPDX-License-Identifier: MIT
//
// Lookup memory: the inner device's memory for lookups: the ids rewritten to slots, at a fixed address for each layer
// so that a captured graph stays valid, and the activations of waves.
// Threading: none of its own; the pool locks.

#pragma once

#include "stats/statistics.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace rotary {

class lookup_memory {
  public:
    lookup_memory(ggml_backend_dev_t inner, statistics & stats) : inner_(inner), stats_(stats) {}

    void set_layers(size_t n_layers);
    void free();

    // A layer's tensor of slot ids, [n_ids, n_tokens]; NULL if there is no memory for it.
    ggml_tensor * slot_ids(int32_t layer, int64_t n_ids, int64_t n_tokens);

    // That tensor in its last shape, and the host's copy, which must live until the inner backend has copied it.
    ggml_tensor *          slot_ids(int32_t layer) const { return layers_[layer].on_device; }
    std::vector<int32_t> & slot_ids_on_host(int32_t layer) { return layers_[layer].on_host; }

    // Give these tensors the scratch memory for one wave; false if there is none. Growing it waits for `user`.
    bool place_in_scratch(ggml_backend_t user, std::initializer_list<ggml_tensor *> tensors);

    uint64_t generation() const { return generation_; } // changes whenever the ids move

  private:
    struct layer_ids {
        ggml_tensor *        on_device = nullptr;
        std::vector<int32_t> on_host;
    };

    ggml_backend_dev_t      inner_;
    statistics &            stats_;
    ggml_context_ptr        context_;
    ggml_backend_buffer_ptr buffer_;
    int64_t                 capacity_ = 0; // ids per layer
    std::vector<layer_ids>  layers_;       // by the layer's index
    ggml_backend_buffer_ptr scratch_;
    uint64_t                generation_ = 0;
};

} // namespace rotary
