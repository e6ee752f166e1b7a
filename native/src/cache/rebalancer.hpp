// SPDX-License-Identifier: MIT
//
// Rebalancer: how many of a model's slots each layer has. Layers begin with equal shares, as the budget is divided;
// then slots move one at a time from the layer that loses least to the layer that gains most. Pure logic: it proposes
// steps, and its owner takes them.
//
// A slot's worth to a layer is measured by two tables without bytes, one with fewer and one with more slots than the
// layer has, that serve the same routings by lfu: the difference of their misses.
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

    // The most slots of a layer that begins with n_slots: for more, too many others would have to give half of theirs.
    static int32_t max_slots(int32_t n_slots, int32_t n_expert) { return std::min(2 * n_slots, n_expert - 1); }

    rebalancer() = default; // without layers: proposes nothing
    explicit rebalancer(const std::vector<layer_slots> & layers);

    // Note a routing of a layer, ids[n_tokens][n_used].
    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens);

    // Takes `n` slots from layer `from`, whose bytes with spare() make one slot for layer `to`.
    struct step {
        int32_t from;
        int32_t to;
        int32_t n;
    };

    bool propose(step & proposed) const; // the step that gains most; false if none is worth it
    void commit(const step & done);

    uint64_t spare() const { return spare_; } // bytes that steps have left over

  private:
    struct layer_use {
        layer_slots                 now;
        int32_t                     n_expert_used = 0; // one token's experts
        std::unique_ptr<slot_table> fewer, more;
        double                      saved  = 0;        // misses that `more` saves over `fewer`; older tokens count less
        double                      demand = 0;        // distinct experts that recent lookups of few tokens wanted

        double unit() const;                           // worth of one saved miss, per slot and byte
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
