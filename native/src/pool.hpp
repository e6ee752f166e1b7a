// SPDX-License-Identifier: MIT
//
// Pool: the paged experts of one model on one device. Knows where each expert's bytes are (the store), which layers
// they form, how the budget is divided, and moves experts into slots. How a graph is run over them is executor.cpp.
//
// Threading: `mutex` is held by whoever runs a graph over the pool or changes its layers or slots; `counter_mutex`
// guards the counters and what rotary_pool_stats() shows, so that figures can be read while a graph runs.

#pragma once

#include "budget.hpp"
#include "rotary.h"
#include "slots.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace rotary {

// One expert matrix of the model, [ne0, ne1, n_expert], in host memory: the mapping or a no-mmap copy.
struct paged_tensor {
    std::string   name;
    ggml_type     type;
    int64_t       ne[3];
    size_t        expert_bytes;    // bytes of one expert: nb[2]
    const char *  data;
    const void *  owner;           // the paged buffer it lies in
    int32_t       n_expert_used;
    ggml_tensor * slots = nullptr; // [ne0, ne1, n_slots] on the inner device; NULL on the mapped path

    const char * expert_data(int32_t expert) const { return data + expert_bytes * expert; }
};

// The tensors that share one routing: gate, up and down of a layer.
struct paged_layer {
    int32_t                     il = -1;
    int32_t                     n_expert;
    int32_t                     n_expert_used = 1;
    uint64_t                    expert_bytes  = 0; // one expert, all tensors
    std::vector<paged_tensor *> tensors;
    rotary_path                 path       = ROTARY_PATH_NONE;
    bool                        host_plain = false; // the inner device can compute from the store itself, exactly
    std::unique_ptr<slot_table> table;              // NULL unless path is SLOTS
    rotary_layer_stats          stats = {};

    // The rewritten ids, on the inner device: a fixed place for each layer, so that a captured graph stays valid.
    ggml_tensor *        slot_ids = nullptr;
    std::vector<int32_t> slot_ids_host; // the copy's source; must live until the inner backend has taken it
};

struct pool_config {
    budget      wanted;
    std::string budget_text  = "auto";
    std::string model        = "model";
    uint64_t    margin_bytes = 0;
    bool        repack       = true;
    bool        direct       = true;
};

class pool {
  public:
    pool(ggml_backend_dev_t inner, pool_config chosen);
    ~pool();

    // ---- store: called by the paged buffers while llama.cpp loads
    void add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used);
    void remove_owner(const void * owner);

    // ---- sizing
    // Divide the budget and allocate the slots unless that is done. Call with `mutex` held.
    int32_t prepare();

    // ---- for the executor, with `mutex` held and prepared
    struct place {
        paged_layer *  layer;
        paged_tensor * tensor;
    };
    // Where a weight with this data pointer belongs; layer NULL if it is not paged here.
    place find(const ggml_tensor * weight) const;

    // Copy one expert into a slot: all tensors of the layer, or one of them.
    void page_in(ggml_backend_t backend, paged_layer & layer, int32_t expert, int32_t slot);
    void page_in(ggml_backend_t backend, paged_tensor & tensor, int32_t expert, int32_t slot);

    // A tensor on the inner device that holds slot ids shaped like ids[n_expert_used, n_tokens]; NULL if no memory.
    ggml_tensor * slot_ids(paged_layer & layer, int64_t n_ids, int64_t n_tokens);

    // A backend that runs over the slots; true the first time, then it must be forgotten when it goes.
    bool use_from(ggml_backend_t backend);
    void forget(ggml_backend_t backend); // takes `mutex`
    bool is_shared() const { return users_.size() > 1; }

    // ---- figures
    void         count(paged_layer & layer, const rotary_layer_stats & delta);
    void         count_wait(uint64_t us);
    void         count_page(uint64_t us);
    void         set_scratch_bytes(size_t bytes);
    void         notice(const std::string & text); // said once: logged as a warning and kept for rotary_pool_notice
    void         stats(rotary_stats & out) const;
    bool         layer_stats(int32_t index, rotary_layer_stats & out) const;
    void         reset_counters();
    const char * notice_text(int32_t index) const;

    std::mutex        mutex;
    const pool_config config;
    bool              inner_is_host() const { return inner_is_host_; }
    ggml_gallocr_t    scratch();                                 // activations of the waves
    uint64_t          generation() const { return generation_; } // changes whenever slots or ids move

  private:
    void     build_layers();
    int32_t  allocate(const std::vector<int32_t> & n_slots);
    void     release();
    uint64_t free_bytes() const;
    void     print_summary() const;

    ggml_backend_buffer_type_t slot_buft(const paged_tensor & tensor) const;

    ggml_backend_dev_t inner_;
    bool               inner_is_host_;

    std::vector<std::unique_ptr<paged_tensor>> tensors_;
    std::vector<std::unique_ptr<paged_layer>>  layers_;
    std::unordered_map<const void *, place>    by_data_;
    bool                                       prepared_ = false;
    int32_t                                    status_   = ROTARY_OK; // of the sizing, so that it is tried once
    std::string                                status_text_;

    std::vector<ggml_context_ptr>        contexts_; // of the slot tensors, one for each buffer type
    std::vector<ggml_backend_buffer_ptr> buffers_;
    ggml_context_ptr                     ids_context_;
    ggml_backend_buffer_ptr              ids_buffer_;
    int64_t                              ids_capacity_ = 0; // elements for each layer
    ggml_gallocr_ptr                     scratch_;
    std::vector<ggml_backend_t>          users_;
    uint64_t                             generation_ = 0;

    mutable std::mutex      counter_mutex_;
    rotary_stats            totals_ = {}; // what layers do not count themselves
    std::deque<std::string> notices_;     // a deque: the texts handed out must not move
    size_t                  scratch_bytes_ = 0;
};

} // namespace rotary
