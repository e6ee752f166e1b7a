// SPDX-License-Identifier: MIT
//
// Split: how many of a model's slots each layer has. They begin even, as the budget divides them, and move one at a time
// from where they serve least to where they would serve most. Pure logic: moves nothing itself.
//
// What a slot is worth to a layer is seen from two tables without bytes, one of fewer slots and one of more, that serve
// the same routings by lfu: the difference of their misses.
// Threading: none of its own; the pool locks.

#pragma once

#include "cache/slot_table.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace rotary {

class slot_split {
  public:
    struct layer_slots {
        int32_t  n_expert;
        int32_t  n_slots;
        int32_t  least; // one token's experts
        int32_t  most;
        uint64_t expert_bytes;
    };

    // Slots that a layer may have: beyond, others would have to give half of theirs.
    static int32_t most(int32_t n_slots, int32_t n_expert) { return std::min(2 * n_slots, n_expert - 1); }

    slot_split() = default; // none: nothing moves
    explicit slot_split(const std::vector<layer_slots> & layers);

    // A routing of a layer, ids[n_tokens][n_used].
    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens);

    // `n` slots of layer `from` for one of layer `to`: once n is their worth of bytes.
    struct move {
        int32_t from;
        int32_t to;
        int32_t n;
    };

    bool propose(move & its) const; // at the most one is worth it; false if none
    void moved(const move & its);

    uint64_t spare() const { return spare_; }

  private:
    struct layer_use {
        layer_slots                 now;
        int32_t                     floor = 0;  // one token's experts
        std::unique_ptr<slot_table> fewer, more;
        double                      saved  = 0; // misses by more slots, a token's counting less with each
        double                      demand = 0; // slots that lookups of few tokens want, lately

        double unit() const;                    // misses a byte of a slot, of a miss saved
        double worth() const { return saved * unit(); }
        double variance() const { return saved * unit() * unit(); }
    };

    void resize(layer_use & its);

    std::vector<layer_use>   layers_;
    std::vector<int32_t>     slot_ids_;
    std::vector<rotary_load> loads_;
    std::vector<bool>        seen_;
    uint64_t                 spare_ = 0; // bytes that moves have left over
};

} // namespace rotary
