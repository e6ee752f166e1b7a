// SPDX-License-Identifier: MIT
//
// Prefetcher. See prefetcher.hpp.

#include "prefetch/prefetcher.hpp"

#include "base/clock.hpp"
#include "prefetch/router_finder.hpp"

#include <algorithm>
#include <numeric>

namespace rotary {

static constexpr int64_t max_tokens = 4; // the largest batch to predict for; larger ones are prompts

// ---- how long a layer takes

// The time from one lookup to the next, without waits for the disk: prefetches that fit into it delay nothing.
void prefetcher::begin_lookup(direct_store & store, int64_t n_tokens) {
    const uint64_t stalled_us = store.counted().stall_us;
    const uint64_t since_us   = now_us() - looked_up_us_;
    if (n_tokens <= max_tokens && looked_up_us_ != 0 && stalled_us >= stalled_us_ &&
        since_us > stalled_us - stalled_us_) {
        gain_.count_layer((double) (since_us - (stalled_us - stalled_us_)));
        store.set_layer_time(gain_.layer_us());
    }
    stalled_us_ = stalled_us;
}

void prefetcher::end_lookup() {
    looked_up_us_ = now_us();
}

// ---- learning from a lookup

void prefetcher::learn(paged_model & model, predictions & predicted, const lookup & now) {
    layer_prediction & at = predicted.layer(*now.layer);
    if (now.in_slots) {
        std::vector<int32_t> named; // misses that trusted guesses had named
        for (int distance = 0; distance < prefetch_gain::n_distances; distance++) {
            for (const auto & [expert, rank] : at.guesses[distance]) {
                const bool missed = std::any_of(now.loads.begin(), now.loads.end(),
                                                [expert = expert](const auto & load) { return load.expert == expert; });
                if (missed || now.layer->table->slot_of(expert) < 0) {
                    gain_.learn(distance, rank, missed);
                }
                if (missed && gain_.trusts(distance, rank) &&
                    std::find(named.begin(), named.end(), expert) == named.end()) {
                    named.push_back(expert);
                }
            }
        }
        if (!at.guesses[0].empty()) {
            gain_.count_gain(model.store.direct()->time_for(named.size() * now.layer->expert_bytes));
        }
    }
    uint64_t n_right = 0;
    for (const guess & each : at.guesses[0]) {
        n_right += std::find(now.experts.begin(), now.experts.end(), each.expert) != now.experts.end();
    }
    model.stats.update([&](rotary_stats & totals) {
        totals.predicted += at.guesses[0].size();
        totals.predicted_right += n_right;
    });
    at.forget_guesses();
}

// ---- predicting lookups

// The products of these layers' routers with `input`, which `layer`'s experts get, for all tokens; empty on failure.
std::vector<const float *> prefetcher::apply_routers(predictions & predicted, const paged_layer & layer,
                                                     const std::vector<paged_layer *> & layers,
                                                     const ggml_tensor * input, int64_t n_tokens) {
    std::vector<router *> gates;
    for (const paged_layer * next : layers) {
        gates.push_back(&predicted.layer(*next).gate);
    }
    std::vector<const float *> products;
    std::vector<float>         hidden(input->ne[0]), normed(hidden.size() * n_tokens);
    for (int64_t t = 0; t < n_tokens; t++) {
        ggml_backend_tensor_get(input, hidden.data(), t * input->nb[2], hidden.size() * sizeof(float));
        predicted.layer(layer).gate.unweight(hidden.data(), &normed[hidden.size() * t]);
    }
    return products_.multiply(gates, normed, n_tokens, products) ? products : std::vector<const float *>();
}

void prefetcher::predict(paged_model & model, predictions & predicted, const lookup & now) {
    paged_layer &       layer = *now.layer;
    const ggml_tensor * ids   = now.node->src[2];
    layer_prediction &  here  = predicted.layer(layer);
    if (!here.router_sought) {
        here.router_sought = true;
        copy_router(here.gate, ids, layer.n_expert);
        if (predicted.applies_routers() && !here.gate.known()) {
            predicted.router_missing(layer, "none is found in the graph, or it cannot be read");
        }
    }
    here.order = now.order;

    const int64_t       n_used   = ids->ne[0];
    const int64_t       n_tokens = ids->ne[1];
    const ggml_tensor * input    = now.node->src[1]; // [n_embd, 1, n_tokens], for experts and router
    const bool          all      = n_used * n_tokens >= 4 * layer.n_expert; // then nearly all experts are wanted
    const bool          routers  = predicted.applies_routers() && here.gate.known() && input->type == GGML_TYPE_F32 &&
                                   input->ne[0] == here.gate.n_embd() && input->ne[1] == 1;
    const bool          usable   = n_tokens <= max_tokens && (routers || predicted.from_routings() != nullptr);
    if (!all && (!usable || !gain_.pays())) {
        return;
    }
    const uint64_t start_us = now_us();
    direct_store & store    = *model.store.direct();

    // As many layers ahead as fill the prefetch window.
    std::vector<paged_layer *> layers, routed; // routed: those predicted by their routers
    const int                  depth = gain_.depth(store.prefetch_window());
    for (paged_layer * next = model.experts.after(layer); next != nullptr && next->index - layer.index <= depth;
         next               = model.experts.after(*next)) {
        const layer_prediction & there     = predicted.layer(*next);
        const bool               by_router = !all && routers && there.gate.n_embd() == here.gate.n_embd();
        if (next->table && !there.order.empty() && (all || by_router || predicted.from_routings() != nullptr)) {
            layers.push_back(next);
            if (by_router) {
                routed.push_back(next);
            }
        }
    }
    const std::vector<const float *> products =
        routed.empty() ? std::vector<const float *>() : apply_routers(predicted, layer, routed, input, n_tokens);

    for (size_t i = 0; i < layers.size() && store.prefetch_bytes() < store.prefetch_window(); i++) {
        const paged_layer &  next     = *layers[i];
        layer_prediction &   there    = predicted.layer(next);
        const int            distance = next.index - layer.index - 1;
        const size_t         gate     = std::find(routed.begin(), routed.end(), &next) - routed.begin();
        std::vector<int32_t> experts, chosen;
        if (all) {
            experts.resize(next.n_expert);
            std::iota(experts.begin(), experts.end(), 0);
        } else if (gate < products.size()) {
            for (int64_t t = 0; t < n_tokens; t++) {
                there.gate.choose(products[gate] + t * next.n_expert, (int32_t) n_used, chosen);
                guess_at(next, there, distance, chosen, experts);
            }
        } else if (predicted.from_routings() != nullptr) {
            predicted.from_routings()->name(layer.index, next.index, (int32_t) n_used, chosen);
            guess_at(next, there, distance, chosen, experts);
        }
        const size_t    before  = store.prefetch_bytes();
        target_source * targets = model.targets.exist(next) && !all ? &predicted : nullptr;
        for (const paged_tensor * tensor : there.order) {
            for (const int32_t expert : experts) {
                if (tensor->direct_io && !model.targets.is_resident(next, expert)) {
                    store.prefetch(*tensor, expert, targets);
                }
            }
        }
        if (!all) {
            gain_.count_read(store.prefetch_bytes() - before);
        }
    }
    if (!all) {
        gain_.count_cost(now_us() - start_us);
    }
}

// Record `chosen`, best first, as guesses for a layer, and add those that the gain trusts to `experts`.
void prefetcher::guess_at(const paged_layer & layer, layer_prediction & at, int distance,
                          const std::vector<int32_t> & chosen, std::vector<int32_t> & experts) const {
    std::vector<guess> & guesses = at.guesses[distance];
    for (size_t rank = 0; rank < chosen.size(); rank++) {
        const bool known = std::any_of(guesses.begin(), guesses.end(),
                                       [&](const guess & each) { return each.expert == chosen[rank]; });
        if (!known && chosen[rank] < layer.n_expert) {
            guesses.push_back({ chosen[rank], (int32_t) rank });
            if (gain_.trusts(distance, (int32_t) rank)) {
                experts.push_back(chosen[rank]);
            }
        }
    }
}

} // namespace rotary
