// SPDX-License-Identifier: MIT
//
// Split. See split.hpp.

#include "cache/rebalancer.hpp"

#include <cmath>

namespace rotary {

slot_split::slot_split(const std::vector<layer_slots> & layers) {
    for (const layer_slots & each : layers) {
        layer_use its;
        its.now   = each;
        its.floor = each.least;
        if (each.n_slots < each.n_expert) {
            // Never less than half of what is even: a layer that serves little now may serve much in another text.
            its.now.least = std::max(each.least, each.n_slots / 2);
            for (std::unique_ptr<slot_table> * table : { &its.fewer, &its.more }) {
                *table = std::make_unique<slot_table>(each.n_expert, each.n_slots,
                                                      lfu_new({ each.n_expert, each.n_slots, 0, 0, {}, nullptr }));
            }
            resize(its);
        }
        layers_.push_back(std::move(its));
    }
}

// As many fewer and more as tell something.
void slot_split::resize(layer_use & its) {
    const int32_t n   = its.now.n_slots;
    const int32_t few = std::max(1, n / 4);
    its.fewer->resize(std::max(its.floor, n - few));
    its.more->resize(std::min(its.now.n_expert, n + few));
}

void slot_split::note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) {
    static constexpr double  keep        = 0.99; // of what was, with each token
    static constexpr int32_t most_tokens = 16;   // of a prompt: the last
    static constexpr double  less        = 0.02; // slots that a demand is forgotten by with each lookup

    // One that wants all experts, as llama.cpp's warming up does, is nobody's routing.
    if (layers_.empty() || !layers_[layer].fewer || n_used > layers_[layer].floor) {
        return;
    }
    layer_use & its = layers_[layer];
    if (n_tokens <= most_tokens) { // several sequences at once: what they want must fit, or it is paged in waves
        seen_.assign(its.now.n_expert, false);
        int32_t n_distinct = 0;
        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            n_distinct += !seen_[ids[i]];
            seen_[ids[i]] = true;
        }
        its.demand = std::max(its.demand - less, (double) n_distinct);
    }
    slot_ids_.resize(n_used);
    loads_.resize(n_used);
    for (int32_t t = std::max(0, n_tokens - most_tokens); t < n_tokens; t++) {
        const int32_t * row = ids + t * n_used;
        its.saved *= keep;
        its.saved += its.fewer->resolve(row, nullptr, n_used, 1, slot_ids_.data(), loads_.data());
        its.saved -= its.more->resolve(row, nullptr, n_used, 1, slot_ids_.data(), loads_.data());
        its.saved = std::max(its.saved, 0.0);
    }
}

double slot_split::layer_use::unit() const {
    return 1.0 / (more->n_slots() - fewer->n_slots()) / (double) now.expert_bytes;
}

bool slot_split::propose(move & its) const {
    static constexpr double sure = 2; // standard deviations of counts, by which the gain must exceed the loss

    const layer_use *to = nullptr, *from = nullptr;
    for (const layer_use & each : layers_) {
        if (each.fewer && each.now.n_slots < each.now.most && (to == nullptr || each.worth() > to->worth())) {
            to = &each;
        }
    }
    for (const layer_use & each : layers_) {
        if (each.fewer && &each != to && each.now.n_slots > std::max((double) each.now.least, each.demand) &&
            (from == nullptr || each.worth() < from->worth())) {
            from = &each;
        }
    }
    if (to == nullptr || from == nullptr ||
        to->worth() - from->worth() <= sure * std::sqrt(to->variance() + from->variance())) {
        return false;
    }
    const uint64_t wanted = to->now.expert_bytes > spare_ ? to->now.expert_bytes - spare_ : 0;
    its.from              = (int32_t) (from - layers_.data());
    its.to                = (int32_t) (to - layers_.data());
    its.n                 = (int32_t) ((wanted + from->now.expert_bytes - 1) / from->now.expert_bytes);
    return from->now.n_slots - its.n >= std::max((double) from->now.least, from->demand);
}

void slot_split::moved(const move & its) {
    layer_use & from = layers_[its.from];
    layer_use & to   = layers_[its.to];
    spare_ += from.now.expert_bytes * its.n - to.now.expert_bytes;
    from.now.n_slots -= its.n;
    to.now.n_slots++;
    resize(from);
    resize(to);
    // Until it shows what the next one is worth: less than this one was.
    to.saved *= 0.8;
    from.saved *= 1.1;
}

} // namespace rotary
