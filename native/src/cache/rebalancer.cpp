// SPDX-License-Identifier: MIT
//
// Rebalancer. See rebalancer.hpp.

#include "cache/rebalancer.hpp"

#include <cmath>

namespace rotary {

rebalancer::rebalancer(const std::vector<layer_slots> & layers) {
    for (const layer_slots & each : layers) {
        layer_use use;
        use.now           = each;
        use.n_expert_used = each.min_slots;
        if (each.n_slots < each.n_expert) {
            // Never below half of an equal share: in another text, a layer that gains little now may gain much.
            use.now.min_slots = std::max(each.min_slots, each.n_slots / 2);
            for (std::unique_ptr<slot_table> * table : { &use.fewer, &use.more }) {
                *table = std::make_unique<slot_table>(each.n_expert, each.n_slots,
                                                      lfu_new({ each.n_expert, each.n_slots, 0, 0, {}, nullptr }));
            }
            use.resize();
        }
        layers_.push_back(std::move(use));
    }
}

// A quarter fewer and a quarter more slots, so that the difference in misses shows.
void rebalancer::layer_use::resize() {
    const int32_t few = std::max(1, now.n_slots / 4);
    fewer->resize(std::max(n_expert_used, now.n_slots - few));
    more->resize(std::min(now.n_expert, now.n_slots + few));
}

void rebalancer::note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) {
    static constexpr double  keep       = 0.99; // of `saved`, with each token
    static constexpr int32_t max_tokens = 16;   // the last ones of a prompt count
    static constexpr double  decay      = 0.02; // slots by which the demand falls with each lookup

    // llama.cpp's warm-up routes to all experts, which says nothing about use.
    if (layers_.empty() || !layers_[layer].fewer || n_used > layers_[layer].n_expert_used) {
        return;
    }
    layer_use & use = layers_[layer];
    if (n_tokens <= max_tokens) { // several sequences at once: if their experts do not fit, they are paged in waves
        seen_.assign(use.now.n_expert, false);
        int32_t n_distinct = 0;
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            n_distinct += !seen_[ids[i]];
            seen_[ids[i]] = true;
        }
        use.demand = std::max(use.demand - decay, (double) n_distinct);
    }
    slot_ids_.resize(n_used);
    loads_.resize(n_used);
    for (int32_t t = std::max(0, n_tokens - max_tokens); t < n_tokens; t++) {
        const int32_t * row = ids + t * n_used;
        use.saved *= keep;
        use.saved += use.fewer->resolve(row, nullptr, n_used, 1, slot_ids_.data(), loads_.data());
        use.saved -= use.more->resolve(row, nullptr, n_used, 1, slot_ids_.data(), loads_.data());
        use.saved = std::max(use.saved, 0.0);
    }
}

double rebalancer::layer_use::unit() const {
    return 1.0 / (more->n_slots() - fewer->n_slots()) / (double) now.expert_bytes;
}

bool rebalancer::propose(step & proposed) const {
    static constexpr double sure = 2; // the gain must exceed the loss by so many standard deviations

    const layer_use *to = nullptr, *from = nullptr;
    for (const layer_use & each : layers_) {
        if (each.fewer && each.now.n_slots < each.now.max_slots && (to == nullptr || each.worth() > to->worth())) {
            to = &each;
        }
    }
    for (const layer_use & each : layers_) {
        if (each.fewer && &each != to && each.now.n_slots > std::max((double) each.now.min_slots, each.demand) &&
            (from == nullptr || each.worth() < from->worth())) {
            from = &each;
        }
    }
    if (to == nullptr || from == nullptr ||
        to->worth() - from->worth() <= sure * std::sqrt(to->variance() + from->variance())) {
        return false;
    }
    const uint64_t wanted = to->now.expert_bytes > spare_ ? to->now.expert_bytes - spare_ : 0;
    proposed.from         = (int32_t) (from - layers_.data());
    proposed.to           = (int32_t) (to - layers_.data());
    proposed.n            = (int32_t) ((wanted + from->now.expert_bytes - 1) / from->now.expert_bytes);
    return from->now.n_slots - proposed.n >= std::max((double) from->now.min_slots, from->demand);
}

void rebalancer::commit(const step & done) {
    layer_use & from = layers_[done.from];
    layer_use & to   = layers_[done.to];
    spare_ += from.now.expert_bytes * done.n - to.now.expert_bytes;
    from.now.n_slots -= done.n;
    to.now.n_slots++;
    from.resize();
    to.resize();
    // Until new routings show the worth of another slot, assume that it is less than this one's.
    to.saved *= 0.8;
    from.saved *= 1.1;
}

} // namespace rotary
