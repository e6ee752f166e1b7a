// SPDX-License-Identifier: MIT
//
// Rebalancer: how many of a model's slots each layer has. Layers begin with equal shares, as the budget divides them; then
// slots go one at a time from where they serve least to where they would serve most. Pure logic: it proposes steps,
// and its owner takes them.
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

class rebalancer {
  public:
    struct layer_slots {
        int32_t  n_expert;
        int32_t  n_slots;
        int32_t  min_slots; // one token's experts
        int32_t  max_slots;
        uint64_t expert_bytes;
    };

    // Slots that a layer may have: beyond, others would have to give half of theirs.
    static int32_t max_slots(int32_t n_slots, int32_t n_expert) { return std::min(2 * n_slots, n_expert - 1); }

    rebalancer() = default; // of no layers: proposes nothing
    explicit rebalancer(const std::vector<layer_slots> & layers);

    // A routing of a layer, ids[n_tokens][n_used].
    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens);

    // `n` slots of layer `from` for one of layer `to`: as many as have its bytes.
    struct step {
        int32_t from;
        int32_t to;
        int32_t n;
    };

    bool propose(step & proposed) const; // the one that gains most; false if none is worth it
    void commit(const step & done);

    uint64_t spare() const { return spare_; } // bytes that steps have left over

  private:
    struct layer_use {
        layer_slots                 now;
        int32_t                     n_expert_used = 0; // one token's experts
        std::unique_ptr<slot_table> fewer, more;
        double                      saved  = 0;        // misses that more slots save; those of older tokens count less
        double                      demand = 0;        // slots that lookups of few tokens want, lately

        double unit() const;                           // worth of a saved miss, by the byte of a slot
        double worth() const { return saved * unit(); }
        double variance() const { return saved * unit() * unit(); }
        void   resize();
    };

    std::vector<layer_use>   layers_;
    std::vector<int32_t>     slot_ids_;
    std::vector<rotary_load> loads_;
    std::vector<bool>        seen_;
    uint64_t                 spare_ = 0;
};

} // namespace rotary
