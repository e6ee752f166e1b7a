// SPDX-License-Identifier: MIT
//
// Executor: which experts the next layers will want. See executor.hpp; how a router is applied early is predictor.cpp.
//
// A layer's router is learnt from the graph at its first lookup: the matrix whose product, through whatever a model puts
// in between, became the ids. So every architecture has it under no particular name.

#include "executor.hpp"

#include "clock.hpp"

#include "ggml-impl.h"

#include <algorithm>

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

void executor::learn_gate(paged_layer & layer, const ggml_tensor * ids) {
    static constexpr int most_steps = 24;

    layer.gate_sought             = true;
    const ggml_tensor * bias      = nullptr; // added to the logits
    const ggml_tensor * selection = nullptr; // added to what the logits became
    const ggml_tensor * at        = ids;
    for (int step = 0; at != nullptr && step < most_steps; step++, at = at->src[0]) {
        if (at->op == GGML_OP_ADD && is_weight(at->src[1], layer.n_expert)) {
            bias = at->src[1];
        } else if (at->op == GGML_OP_UNARY && bias != nullptr && selection == nullptr) {
            std::swap(bias, selection);
        } else if (at->op == GGML_OP_MUL_MAT && at->src[0]->op == GGML_OP_NONE && at->src[0]->ne[1] == layer.n_expert) {
            break;
        }
    }
    if (at == nullptr || at->op != GGML_OP_MUL_MAT) {
        return;
    }
    const int64_t       n_embd = at->src[0]->ne[0];
    const ggml_tensor * input  = at->src[1];
    while (input->op == GGML_OP_RESHAPE || input->op == GGML_OP_VIEW) {
        input = input->src[0];
    }
    const ggml_tensor * norm = input->op == GGML_OP_MUL && is_weight(input->src[1], n_embd) ? input->src[1] : nullptr;

    const std::vector<float> weight = read_weight(at->src[0]);
    if (weight.size() == (size_t) (n_embd * layer.n_expert)) {
        const auto values = [](const ggml_tensor * its) {
            return its ? read_weight(its) : std::vector<float>();
        };
        layer.gate.set(weight, values(norm), values(bias), values(selection), n_embd);
    }
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

void executor::foretell(pool & pool, paged_layer & layer, const ggml_tensor * node) {
    static constexpr int64_t most_tokens = 4; // of a batch to predict for

    if (!layer.gate_sought) {
        learn_gate(layer, lookup_.ids);
    }
    layer.order = lookup_.order;
    for (paged_tensor * tensor : layer.tensors) {
        tensor->leads = tensor == layer.order[0];
    }

    const int64_t       n_used   = lookup_.ids->ne[0];
    const int64_t       n_tokens = lookup_.ids->ne[1];
    const ggml_tensor * input    = node->src[1]; // [n_embd, 1, n_tokens]: what the experts get, as the router did
    const bool          all      = n_used * n_tokens >= 4 * layer.n_expert; // then hardly any is left out
    const bool          usable   = layer.gate.known() && input->type == GGML_TYPE_F32 && n_tokens <= most_tokens &&
                                   input->ne[0] == layer.gate.n_embd() && input->ne[1] == 1;
    if (!all && (!usable || !experience_.pays())) {
        return;
    }
    const uint64_t start_us = now_us();

    std::vector<paged_layer *> layers;
    std::vector<router *>      gates;
    for (paged_layer * next = layer.next; next != nullptr && layers.size() < experience::n_distances;
         next               = next->next) {
        if (next->table && !next->order.empty() && (all || next->gate.n_embd() == layer.gate.n_embd())) {
            layers.push_back(next);
            gates.push_back(&next->gate);
        }
    }
    std::vector<float>         hidden(all ? 0 : input->ne[0]), normed(hidden.size() * n_tokens);
    std::vector<const float *> products;
    for (int64_t t = 0; !all && t < n_tokens; t++) {
        ggml_backend_tensor_get(input, hidden.data(), t * input->nb[2], hidden.size() * sizeof(float));
        layer.gate.unweight(hidden.data(), &normed[hidden.size() * t]);
    }
    if (layers.empty() || (!all && !predictor_.multiply(gates, normed, n_tokens, products))) {
        return;
    }
    // Layers ahead, as far as the window of prefetches reaches.
    direct_store * store = pool.direct();
    for (size_t i = 0; i < layers.size() && store->prefetch_bytes() < store->prefetch_window(); i++) {
        paged_layer &        next    = *layers[i];
        std::vector<guess> & guesses = next.foretold[i];
        std::vector<int32_t> experts, chosen;
        guesses.clear();
        for (int32_t expert = 0; all && expert < next.n_expert; expert++) {
            experts.push_back(expert);
        }
        for (int64_t t = 0; !all && t < n_tokens; t++) {
            next.gate.choose(products[i] + t * next.n_expert, (int32_t) n_used, chosen);
            for (size_t rank = 0; rank < chosen.size(); rank++) {
                const bool known = std::any_of(guesses.begin(), guesses.end(),
                                               [&](const guess & each) { return each.expert == chosen[rank]; });
                if (!known) {
                    guesses.push_back({ chosen[rank], (int32_t) rank });
                    if (experience_.trusts((int) i, (int32_t) rank)) {
                        experts.push_back(chosen[rank]);
                    }
                }
            }
        }
        for (const paged_tensor * tensor : next.order) {
            for (const int32_t expert : experts) {
                if (next.table->slot_of(expert) < 0 && (!next.ram || next.ram->slot_of(expert) < 0)) {
                    store->prefetch(*tensor, expert, next.landing != nullptr && !all);
                }
            }
        }
    }
    if (!all) {
        experience_.count_cost(now_us() - start_us);
    }
}

} // namespace rotary
