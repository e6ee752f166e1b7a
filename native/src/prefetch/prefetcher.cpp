// SPDX-License-Identifier: MIT
//
// Executor: which experts the next layers will want. See executor.hpp; how a router is applied early is
// predictors/router.cpp.
//
// A layer's router is learnt from the graph at its first lookup: the matrix whose product, through whatever a model puts
// in between, became the ids. So every architecture has it under no particular name.

#include "exec/executor.hpp"

#include "base/clock.hpp"
#include "base/error.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <numeric>

namespace rotary {

// A weight as floats; empty if it cannot be read where it lies.
static std::vector<float> read_weight(const ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src != nullptr ? weight->view_src->buffer : weight->buffer;
    const auto *                traits = ggml_get_type_traits(weight->type);
    std::vector<float>          values(ggml_nelements(weight));
    if (buffer == nullptr || buffer->iface.get_tensor == nullptr || !ggml_is_contiguous(weight) ||
        (weight->type != GGML_TYPE_F32 && traits->to_float == nullptr)) {
        return {};
    }
    std::vector<char> bytes(ggml_nbytes(weight));
    ggml_backend_tensor_get(weight, bytes.data(), 0, bytes.size());
    if (weight->type == GGML_TYPE_F32) {
        std::copy_n((const float *) (const void *) bytes.data(), values.size(), values.begin());
    } else {
        traits->to_float(bytes.data(), values.data(), (int64_t) values.size());
    }
    return values;
}

static bool is_weight(const ggml_tensor * tensor, int64_t n) {
    return tensor != nullptr && tensor->op == GGML_OP_NONE && ggml_nelements(tensor) == n;
}

// The weights of a layer's router. NULL where there are none.
struct gate_weights {
    const ggml_tensor * router    = nullptr; // [n_embd, n_expert]
    const ggml_tensor * norm      = nullptr; // [n_embd] of the norm before it
    const ggml_tensor * bias      = nullptr; // [n_expert] added to the logits
    const ggml_tensor * selection = nullptr; // [n_expert] added to what the logits became
};

static gate_weights find_gate(const paged_layer & layer, const ggml_tensor * ids) {
    static constexpr int most_steps = 24;

    gate_weights        found;
    const ggml_tensor * at = ids;
    for (int step = 0; at != nullptr && step < most_steps; step++, at = at->src[0]) {
        if (at->op == GGML_OP_ADD && is_weight(at->src[1], layer.n_expert)) {
            found.bias = at->src[1];
        } else if (at->op == GGML_OP_UNARY && found.bias != nullptr && found.selection == nullptr) {
            std::swap(found.bias, found.selection);
        } else if (at->op == GGML_OP_MUL_MAT && at->src[0]->op == GGML_OP_NONE && at->src[0]->ne[1] == layer.n_expert) {
            break;
        }
    }
    if (at == nullptr || at->op != GGML_OP_MUL_MAT) {
        return {};
    }
    found.router              = at->src[0];
    const ggml_tensor * input = at->src[1];
    while (input->op == GGML_OP_RESHAPE || input->op == GGML_OP_VIEW) {
        input = input->src[0];
    }
    if (input->op == GGML_OP_MUL && is_weight(input->src[1], found.router->ne[0])) {
        found.norm = input->src[1];
    }
    return found;
}

static std::vector<float> values_of(const ggml_tensor * weight) {
    return weight != nullptr ? read_weight(weight) : std::vector<float>();
}

static void learn_gate(paged_layer & layer, const ggml_tensor * ids) {
    layer.gate_sought        = true;
    const gate_weights found = find_gate(layer, ids);
    if (found.router == nullptr) {
        return;
    }
    const std::vector<float> weight = read_weight(found.router);
    if ((int64_t) weight.size() == found.router->ne[0] * layer.n_expert) {
        layer.gate.set(weight, values_of(found.norm), values_of(found.bias), values_of(found.selection),
                       found.router->ne[0]);
    }
}

// ---- on the device

// Floats that the inner device can read where they are.
static bool is_on_device(const ggml_tensor * weight, ggml_backend_t inner) {
    const ggml_backend_buffer_t buffer = weight->view_src != nullptr ? weight->view_src->buffer : weight->buffer;
    return buffer != nullptr && weight->type == GGML_TYPE_F32 && ggml_is_contiguous(weight) &&
           ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) == ggml_backend_get_device(inner);
}

static void learn_gate_on_device(pool & pool, paged_layer & layer, const ggml_tensor * ids, ggml_backend_t inner) {
    layer.gate_sought        = true;
    const gate_weights found = find_gate(layer, ids);
    bool               there = found.router != nullptr;
    for (const ggml_tensor * each : { found.router, found.bias, found.selection }) {
        there = there && (each == nullptr || is_on_device(each, inner));
    }
    if (!there) {
        pool.no_router(layer, format("it, or what is added to it, is not there as F32: %s",
                                     found.router != nullptr ? found.router->name : "none is found in the graph"));
        return;
    }
    const auto data = [](const ggml_tensor * its) {
        return its != nullptr ? (const float *) its->data : nullptr;
    };
    layer.ahead.n_embd    = (int32_t) found.router->ne[0];
    layer.ahead.router    = data(found.router);
    layer.ahead.bias      = data(found.bias);
    layer.ahead.selection = data(found.selection);
    layer.norm            = values_of(found.norm);
    layer.norm.resize(layer.ahead.n_embd, 1.0f);
}

// What the link needs to foretell the next layer's lookup at this one; false if it cannot.
bool executor::foretell_on_device(pool & pool, paged_layer & layer, const ggml_tensor * node,
                                  rotary_link_foretelling & its) {
    const ggml_tensor * state = node->src[1]; // [n_embd, 1, n_tokens]: what the experts get, as the router did
    const ggml_tensor * ids   = node->src[2];
    paged_layer *       next  = layer.next;
    if (!layer.gate_sought) {
        learn_gate_on_device(pool, layer, ids, inner_);
    }
    // What was foretold for a lookup that has not come, since nobody wanted that layer's output, still stands.
    if (next == nullptr || next->resolved.foretold || layer.ahead.router == nullptr || next->ahead.router == nullptr ||
        next->ahead.n_embd != layer.ahead.n_embd || state->type != GGML_TYPE_F32 ||
        state->ne[0] != layer.ahead.n_embd || state->nb[0] != sizeof(float) || state->ne[1] != 1 ||
        ids->ne[1] > ROTARY_PAGE_MOST_TOKENS || !pool.resolves_on_device(*next, ggml_nelements(ids))) {
        return false;
    }
    if (next->ahead.scale == nullptr) {
        // Each router gets a normed state with its own norm's weights: this one's are divided out.
        std::vector<float> scale(layer.norm.size());
        for (size_t i = 0; i < scale.size(); i++) {
            scale[i] = layer.norm[i] != 0.0f ? next->norm[i] / layer.norm[i] : 0.0f;
        }
        if (!pool.set_scale(*next, scale)) {
            return false;
        }
    }
    pool.table_to_device(*next);
    its          = next->ahead;
    its.number   = next->resolved.number + 1;
    its.state    = (const char *) state->data;
    its.stride   = (int64_t) state->nb[2];
    its.n_tokens = (int32_t) ids->ne[1];
    its.n_used   = (int32_t) ids->ne[0];
    return true;
}

// How right the guesses at this lookup were, and what following them is worth.
void executor::look_back(pool & pool, paged_layer & layer, const std::vector<int32_t> & experts) {
    rotary_stats delta = {};
    if (lookup_.how == mode::slots) {
        std::vector<int32_t> foreseen;
        for (int distance = 0; distance < experience::n_distances; distance++) {
            for (const auto & [expert, rank] : layer.foretold[distance]) {
                const auto is_it = [expert = expert](const rotary_load & load) {
                    return load.expert == expert;
                };
                const bool missed = std::any_of(lookup_.loads.begin(), lookup_.loads.end(), is_it);
                if (missed || layer.table->slot_of(expert) < 0) {
                    experience_.learn(distance, rank, missed);
                }
                if (missed && experience_.trusts(distance, rank) &&
                    std::find(foreseen.begin(), foreseen.end(), expert) == foreseen.end()) {
                    foreseen.push_back(expert);
                }
            }
        }
        if (!layer.foretold[0].empty()) {
            experience_.count_gain(pool.direct()->time_for(foreseen.size() * layer.expert_bytes));
        }
    }
    delta.predicted = layer.foretold[0].size();
    for (const guess & each : layer.foretold[0]) {
        delta.predicted_right += std::find(experts.begin(), experts.end(), each.expert) != experts.end();
    }
    pool.count_prefetch(delta);
    for (std::vector<guess> & guesses : layer.foretold) {
        guesses.clear();
    }
}

// The time of a layer, from its lookup to the next one's, without waits for the disk: so much may be read ahead for nothing.
void executor::count_layer(pool & pool, int64_t n_tokens) {
    static constexpr int64_t most_tokens = 4; // more are a prompt

    direct_store * store = pool.direct();
    if (store == nullptr) {
        return;
    }
    const uint64_t stalled_us = store->counted().stall_us;
    const uint64_t since_us   = now_us() - looked_up_us_;
    if (n_tokens <= most_tokens && looked_up_us_ != 0 && stalled_us >= stalled_us_ &&
        since_us > stalled_us - stalled_us_) {
        experience_.count_layer((double) (since_us - (stalled_us - stalled_us_)));
        store->expect_layers_of(experience_.layer_us());
    }
    stalled_us_ = stalled_us;
}

// The products of these layers' routers with what `layer`'s experts get, for all tokens; none if they cannot be had.
std::vector<const float *> executor::apply_routers(const paged_layer & layer, const std::vector<paged_layer *> & layers,
                                                   const ggml_tensor * input, int64_t n_tokens) {
    std::vector<router *> gates;
    for (paged_layer * next : layers) {
        gates.push_back(&next->gate);
    }
    std::vector<const float *> products;
    std::vector<float>         hidden(input->ne[0]), normed(hidden.size() * n_tokens);
    for (int64_t t = 0; t < n_tokens; t++) {
        ggml_backend_tensor_get(input, hidden.data(), t * input->nb[2], hidden.size() * sizeof(float));
        layer.gate.unweight(hidden.data(), &normed[hidden.size() * t]);
    }
    return products_.multiply(gates, normed, n_tokens, products) ? products : std::vector<const float *>();
}

void executor::foretell(pool & pool, paged_layer & layer, const ggml_tensor * node) {
    static constexpr int64_t most_tokens = 4; // of a batch to predict for

    if (!layer.gate_sought) {
        learn_gate(layer, lookup_.ids);
        if (pool.applies_routers() && !layer.gate.known()) {
            pool.no_router(layer, "none is found in the graph, or it cannot be read");
        }
    }
    layer.order = lookup_.order;
    for (paged_tensor * tensor : layer.tensors) {
        tensor->leads = tensor == lookup_.leader();
    }

    const int64_t       n_used   = lookup_.ids->ne[0];
    const int64_t       n_tokens = lookup_.ids->ne[1];
    const ggml_tensor * input    = node->src[1]; // [n_embd, 1, n_tokens]: what the experts get, as the router did
    const bool          all      = n_used * n_tokens >= 4 * layer.n_expert; // then hardly any is left out
    const bool          routers  = pool.applies_routers() && layer.gate.known() && input->type == GGML_TYPE_F32 &&
                                   input->ne[0] == layer.gate.n_embd() && input->ne[1] == 1;
    const bool          usable   = n_tokens <= most_tokens && (routers || pool.predictor() != nullptr);
    if (!all && (!usable || !experience_.pays())) {
        return;
    }
    const uint64_t start_us = now_us();
    direct_store * store    = pool.direct();

    // As many layers ahead as fill the window of prefetches.
    std::vector<paged_layer *> layers, routed; // of these, those whose routers say it
    const int                  depth = experience_.depth(store->prefetch_window());
    for (paged_layer * next = layer.next; next != nullptr && next->index - layer.index <= depth; next = next->next) {
        const bool by_router = !all && routers && next->gate.n_embd() == layer.gate.n_embd();
        if (next->table && !next->order.empty() && (all || by_router || pool.predictor() != nullptr)) {
            layers.push_back(next);
            if (by_router) {
                routed.push_back(next);
            }
        }
    }
    const std::vector<const float *> products =
        routed.empty() ? std::vector<const float *>() : apply_routers(layer, routed, input, n_tokens);

    for (size_t i = 0; i < layers.size() && store->prefetch_bytes() < store->prefetch_window(); i++) {
        paged_layer &        next     = *layers[i];
        const int            distance = next.index - layer.index - 1;
        const size_t         gate     = std::find(routed.begin(), routed.end(), &next) - routed.begin();
        std::vector<int32_t> experts, chosen;
        if (all) {
            experts.resize(next.n_expert);
            std::iota(experts.begin(), experts.end(), 0);
        } else if (gate < products.size()) {
            for (int64_t t = 0; t < n_tokens; t++) {
                next.gate.choose(products[gate] + t * next.n_expert, (int32_t) n_used, chosen);
                guess_at(next, distance, chosen, experts);
            }
        } else if (pool.predictor() != nullptr) {
            pool.predictor()->name(layer.index, next.index, (int32_t) n_used, chosen);
            guess_at(next, distance, chosen, experts);
        }
        const size_t before = store->prefetch_bytes();
        for (const paged_tensor * tensor : next.order) {
            for (const int32_t expert : experts) {
                if (tensor->direct && next.table->slot_of(expert) < 0 && (!next.ram || next.ram->slot_of(expert) < 0)) {
                    store->prefetch(*tensor, expert, next.landing != nullptr && !all);
                }
            }
        }
        if (!all) {
            experience_.count_read(store->prefetch_bytes() - before);
        }
    }
    if (!all) {
        experience_.count_cost(now_us() - start_us);
    }
}

// Note that these are foretold for a layer, best first; those of them that experience trusts are to be read.
void executor::guess_at(paged_layer & layer, int distance, const std::vector<int32_t> & chosen,
                        std::vector<int32_t> & experts) const {
    std::vector<guess> & guesses = layer.foretold[distance];
    for (size_t rank = 0; rank < chosen.size(); rank++) {
        const bool known = std::any_of(guesses.begin(), guesses.end(),
                                       [&](const guess & each) { return each.expert == chosen[rank]; });
        if (!known && chosen[rank] < layer.n_expert) {
            guesses.push_back({ chosen[rank], (int32_t) rank });
            if (experience_.trusts(distance, (int32_t) rank)) {
                experts.push_back(chosen[rank]);
            }
        }
    }
}

} // namespace rotary
