// SPDX-License-Identifier: MIT
//
// Device tables: page tables in the inner device's memory, for layers whose lookups it resolves itself, since it can
// read all their experts. Then the host neither waits for the routing nor moves a byte. A table is valid in one place
// at a time: a batch that needs it on the host takes it back, and the next lookup on the device moves it there again.
// Threading: none of its own; the pool locks.

#pragma once

#include "cache/slot_table.hpp"
#include "link/link.hpp"
#include "link/link_api.h"
#include "stats/statistics.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <string>
#include <vector>

namespace rotary {

class device_tables {
  public:
    device_tables(ggml_backend_dev_t inner, std::string model, statistics & stats) :
        inner_(inner), model_(std::move(model)), stats_(stats) {}

    // What a table needs to know of a layer. No slots, or a tensor that the device cannot read, means no table.
    struct layer {
        int32_t                         il;
        int32_t                         n_expert;
        uint64_t                        expert_bytes;
        slot_table *                    slots;
        std::vector<rotary_link_tensor> tensors;
        int64_t                         max_embd; // maximal n_embd of a prediction
    };

    // Allocate tables for the layers that can have one; none without a link. False if the device has no memory for
    // them. Without pinned memory for the counts there are no tables either, and `reason` says why.
    bool allocate(link * over, const std::vector<layer> & layers, std::string & reason);
    void free();

    bool any() const { return n_tables_ > 0; }
    bool resolves(int32_t layer, int64_t n_ids) const; // whether the device can, for n_ids ids
    bool is_predicted(int32_t layer) const { return states_[layer].lookup.predicted; }

    void to_device(int32_t layer);
    bool to_host(int32_t layer); // waits for the link; false with this thread's error
    void forget();               // discard what the device has: the host's tables are valid again

    // A layer's lookup, but for the ids; and a prediction of it, but for the router and the state.
    rotary_link_lookup &     lookup(int32_t layer) { return states_[layer].lookup; }
    rotary_link_prediction & prediction(int32_t layer) { return states_[layer].prediction; }
    bool set_scale(int32_t layer, const std::vector<float> & scale); // factors of the state; false: no room

    // send_counts() enqueues the copy of the device's counters to the host; once it has ended, take_counts() adds them
    // to the statistics. False with this thread's error, such as that a lookup was refused.
    bool send_counts();
    bool take_counts();

  private:
    struct layer_state {
        layer                  about;
        rotary_link_lookup     lookup     = {};
        rotary_link_prediction prediction = {};
        rotary_page_state      counted    = {};    // as last taken from the device
        size_t                 offset     = 0;     // of the table in memory_; 0 if there is none
        bool                   on_device  = false; // the table is valid there, not on the host
    };

    void take_memory(char * base, size_t copy_at, size_t scores_at);
    bool take_counts(layer_state & state, const rotary_page_state & now);

    ggml_backend_dev_t       inner_;
    std::string              model_; // name for messages
    statistics &             stats_;
    link *                   link_ = nullptr;
    std::vector<layer_state> states_; // by the layer's index
    int32_t                  n_tables_ = 0;
    ggml_context_ptr         context_;
    ggml_backend_buffer_ptr  buffer_;
    ggml_tensor *            memory_ = nullptr; // bytes: the states of all layers, their tables, scratch
    link::pinned             counts_;           // the states of all layers as they last arrived
};

} // namespace rotary
