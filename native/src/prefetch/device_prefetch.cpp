// SPDX-License-Identifier: MIT
//
// Device prefetch. See device_prefetch.hpp.

#include "prefetch/device_prefetch.hpp"

#include "base/error.hpp"
#include "prefetch/router_finder.hpp"

namespace rotary {

static void find_on_device(paged_model & model, predictions & predicted, const paged_layer & layer,
                           const ggml_tensor * ids, ggml_backend_t inner) {
    layer_prediction &   here  = predicted.layer(layer);
    const router_weights found = find_router(ids, layer.n_expert);
    bool                 there = found.router != nullptr;
    here.router_sought         = true;
    for (const ggml_tensor * each : { found.router, found.bias, found.selection }) {
        there = there && (each == nullptr || is_on_device(each, inner));
    }
    if (!there) {
        predicted.router_missing(layer,
                                 format("it, or what is added to it, is not there as F32: %s",
                                        found.router != nullptr ? found.router->name : "none is found in the graph"));
        return;
    }
    const auto data = [](const ggml_tensor * weight) {
        return weight != nullptr ? (const float *) weight->data : nullptr;
    };
    rotary_link_prediction & prediction = model.tables.prediction(layer.index);
    prediction.n_embd                   = (int32_t) found.router->ne[0];
    prediction.router                   = data(found.router);
    prediction.bias                     = data(found.bias);
    prediction.selection                = data(found.selection);
    here.norm                           = read_weight(found.norm);
    here.norm.resize(prediction.n_embd, 1.0f);
}

bool predict_on_device(paged_model & model, predictions & predicted, const paged_layer & layer,
                       const ggml_tensor * node, ggml_backend_t inner, rotary_link_prediction & prediction) {
    const ggml_tensor *        state = node->src[1]; // [n_embd, 1, n_tokens], for experts and router
    const ggml_tensor *        ids   = node->src[2];
    const paged_layer *        next  = model.experts.after(layer);
    const std::vector<float> & norm  = predicted.layer(layer).norm;
    if (!predicted.layer(layer).router_sought) {
        find_on_device(model, predicted, layer, ids, inner);
    }
    if (next == nullptr || !model.tables.resolves(next->index, ggml_nelements(ids))) {
        return false;
    }
    const rotary_link_prediction & here  = model.tables.prediction(layer.index);
    const rotary_link_prediction & there = model.tables.prediction(next->index);
    // A prediction for a lookup that never came, because that layer's output was not wanted, still stands.
    if (model.tables.is_predicted(next->index) || here.router == nullptr || there.router == nullptr ||
        there.n_embd != here.n_embd || state->type != GGML_TYPE_F32 || state->ne[0] != here.n_embd ||
        state->nb[0] != sizeof(float) || state->ne[1] != 1 || ids->ne[1] > ROTARY_PAGE_MAX_TOKENS) {
        return false;
    }
    if (there.scale == nullptr) {
        // Each router expects the state times its own norm's weights: replace this layer's by the next one's.
        const std::vector<float> & next_norm = predicted.layer(*next).norm;
        std::vector<float>         scale(norm.size());
        for (size_t i = 0; i < scale.size(); i++) {
            scale[i] = norm[i] != 0.0f ? next_norm[i] / norm[i] : 0.0f;
        }
        if (!model.tables.set_scale(next->index, scale)) {
            return false;
        }
    }
    model.tables.to_device(next->index);
    prediction          = there;
    prediction.number   = model.tables.lookup(next->index).number + 1;
    prediction.state    = (const char *) state->data;
    prediction.stride   = (int64_t) state->nb[2];
    prediction.n_tokens = (int32_t) ids->ne[1];
    prediction.n_used   = (int32_t) ids->ne[0];
    return true;
}

} // namespace rotary
