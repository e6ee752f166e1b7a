// SPDX-License-Identifier: MIT
//
// Catalogue: the paged tensors of one model and the layers they form.
//
// model/ owns what a pool pages and where it is paged to: the catalogue (here), the configuration (config.hpp), the memory
// of the inner device for slots (slot_memory.hpp) and for what a lookup computes with (lookup_memory.hpp), the read targets
// among the slots (read_targets.hpp), the way from a budget to allocated slots (sizing.hpp, first_fill.hpp), and what
// follows while the model runs: memory pressure (memory_governor.hpp) and rebalancing (rebalancing.hpp). paged_model.hpp
// puts these beside the parts of lower rooms. Called by pool/, prefetch/ and exec/.
// Threading: none of its own; everything here lives under the pool's lock.

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

// The tensors that share one routing: gate, up and down of a layer. Other rooms keep their own state by the index.
struct paged_layer {
    int32_t                     il    = -1; // of the model
    int32_t                     index = 0;  // among the pool's
    int32_t                     n_expert;
    int32_t                     n_expert_used = 1;
    uint64_t                    expert_bytes  = 0; // one expert, all tensors
    std::vector<paged_tensor *> tensors;
    rotary_path                 path       = ROTARY_PATH_NONE;
    bool                        maps_plain = false; // the inner device can compute from the mapping itself, exactly
    bool                        reads_into_slots = false; // slots are read targets: they have the file's layout
    std::unique_ptr<slot_table> table;                    // NULL unless path is SLOTS
    int32_t                     n_allocated = 0;          // slots there is address space for; the table may use fewer

    int32_t n_slots() const { return table ? table->n_slots() : n_expert; }
    int32_t n_resident() const { return table ? table->n_resident() : n_expert; }

    bool uses_direct_io() const;      // for any of its tensors
    bool reads_whole_sectors() const; // direct I/O reads each expert as whole sectors of the file
};

// "blk.12.ffn_up_exps.weight" -> 12; -1 if there is none.
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
    paged_layer * after(const paged_layer & layer) const; // in a graph; NULL at the end

    // Where a weight of a graph belongs; layer NULL if it is not a whole matrix that is paged here.
    struct place {
        paged_layer *  layer;
        paged_tensor * tensor;
    };
    place find(const ggml_tensor * weight) const;

    // Whether all of these experts are of the model's layer `il`.
    bool has_experts(int32_t il, const std::vector<int32_t> & experts) const;

  private:
    std::vector<std::unique_ptr<paged_tensor>> tensors_;
    std::vector<std::unique_ptr<paged_layer>>  layers_;
    std::unordered_map<const void *, place>    by_data_;
};

} // namespace rotary
