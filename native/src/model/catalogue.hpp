// SPDX-License-Identifier: MIT
//
// Catalogue: the paged tensors of one model and the layers they form.
//
// model/ owns what a pool pages and the memory it is paged to: the catalogue (here), the configuration (config.hpp),
// the inner device's memory for slots (slot_memory.hpp), for lookups (lookup_memory.hpp) and beside them
// (device_memory.hpp), the read targets among the slots (read_targets.hpp), the way from a budget to filled slots
// (sizing.hpp, available_memory.hpp, first_fill.hpp), and changes while the model runs: memory pressure
// (memory_governor.hpp) and rebalancing (rebalancing.hpp). paged_model.hpp combines these with the parts of lower
// rooms. Called by pool/, prefetch/ and exec/.
// Threading: none of its own; the pool's lock guards everything here.

#pragma once

#include "cache/division.hpp"
#include "cache/slot_table.hpp"
#include "rotary.h"
#include "store/stored_tensor.hpp"

#include "ggml.h"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace rotary {

// One expert matrix of the model, [ne0, ne1, n_expert].
struct paged_tensor : stored_tensor {
    ggml_type     type;
    int64_t       ne[3];
    int32_t       n_expert_used;
    ggml_tensor * slots = nullptr; // [ne0, ne1, n_slots] on the inner device; NULL on the mapped path
};

// The tensors that share one routing: gate, up and down of a layer. Other rooms keep their state of a layer by `index`.
struct paged_layer {
    int32_t                     il    = -1; // the model's layer number; -1 if the names have none
    int32_t                     index = 0;  // among the pool's layers
    int32_t                     n_expert;
    int32_t                     n_expert_used = 1;
    uint64_t                    expert_bytes  = 0; // of one expert in all tensors
    std::vector<paged_tensor *> tensors;
    rotary_path                 path             = ROTARY_PATH_NONE;
    bool                        maps_plain       = false; // the inner device can compute from the mapping, same result
    bool                        reads_into_slots = false; // slots are read targets: they have the file's layout
    std::unique_ptr<slot_table> table;                    // NULL unless path is SLOTS
    int32_t                     n_allocated = 0;          // slots that have address space; the table may use fewer

    int32_t n_slots() const { return table ? table->n_slots() : n_expert; }
    int32_t n_resident() const { return table ? table->n_resident() : n_expert; }

    bool uses_direct_io() const;      // for any of its tensors
    bool reads_whole_sectors() const; // direct I/O reads each expert as whole sectors of the file
};

// "blk.12.ffn_up_exps.weight" -> 12; -1 if the name has no layer number.
int32_t layer_number(const std::string & name);

class catalogue {
  public:
    paged_tensor & add(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped);
    void           remove_owner(const void * owner);

    void build_layers();
    void clear_layers();

    const std::vector<std::unique_ptr<paged_tensor>> & tensors() const { return tensors_; }
    const std::vector<std::unique_ptr<paged_layer>> &  layers() const { return layers_; }
    std::vector<const stored_tensor *>                 stored() const;
    std::vector<layer_size>                            layer_sizes() const;

    paged_layer & layer_of(const stored_tensor & tensor) const { return *layers_[tensor.layer]; }
    paged_layer * after(const paged_layer & layer) const; // the layer that a graph uses next; NULL after the last

    // The layer and tensor that a graph's weight belongs to; NULL if it is not the whole of a paged matrix.
    struct place {
        paged_layer *  layer;
        paged_tensor * tensor;
    };
    place find(const ggml_tensor * weight) const;

    // Whether the model's layer `il` has all of these experts; true if none of its tensors is paged.
    bool has_experts(int32_t il, const std::vector<int32_t> & experts) const;

  private:
    std::vector<std::unique_ptr<paged_tensor>> tensors_;
    std::vector<std::unique_ptr<paged_layer>>  layers_;
    std::unordered_map<const void *, place>    by_data_;
};

} // namespace rotary
