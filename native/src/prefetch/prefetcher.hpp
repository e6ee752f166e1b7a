// SPDX-License-Identifier: MIT
//
// Prefetcher: reads the experts that the next layers will probably want, while the disk has nothing else to do.
//
// prefetch/ predicts lookups: it finds routers in graphs (router_finder.hpp) and applies them early (router.hpp), or
// predicts from routings alone (predictors/); it keeps a pool's predictor and predictions (predictions.hpp) and
// measures what following them gains (gain.hpp). Two parts act on predictions: this one through the direct store,
// device_prefetch.hpp over the link. A wrong prediction costs time, and changes no result. Called by exec/, pool/
// (predictions) and capi/ (predictors without a model).
// Threading: one prefetcher for each backend, one graph at a time, under the lock of the pool that the graph runs over.

#pragma once

#include "model/paged_model.hpp"
#include "prefetch/gain.hpp"
#include "prefetch/predictions.hpp"
#include "prefetch/router.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace rotary {

class prefetcher {
  public:
    explicit prefetcher(ggml_backend_t inner) : products_(inner) {}

    // A lookup that the host has resolved.
    struct lookup {
        paged_layer *                       layer;
        const ggml_tensor *                 node;     // its MUL_MAT_ID
        const std::vector<paged_tensor *> & order;    // the layer's tensors, in the order in which the graph uses them
        const std::vector<int32_t> &        experts;  // distinct
        const std::vector<rotary_load> &    loads;    // the absent ones; empty unless in_slots
        bool                                in_slots; // all experts have slots
    };

    void begin_graph() { looked_up_us_ = 0; } // the time between two graphs is not a layer's
    void begin_lookup(direct_store & store, int64_t n_tokens);
    void end_lookup();

    // Learn how good the guesses for this lookup were and what following them gains.
    void learn(paged_model & model, predictions & predicted, const lookup & now);

    // Predict the next lookups and queue reads of the experts that they will want.
    void predict(paged_model & model, predictions & predicted, const lookup & now);

  private:
    std::vector<const float *> apply_routers(predictions & predicted, const paged_layer & layer,
                                             const std::vector<paged_layer *> & layers, const ggml_tensor * input,
                                             int64_t n_tokens);
    void guess_at(const paged_layer & layer, layer_prediction & at, int distance, const std::vector<int32_t> & chosen,
                  std::vector<int32_t> & experts) const;

    router_products products_;
    prefetch_gain   gain_;
    uint64_t        looked_up_us_ = 0; // end of the last lookup; 0: none in this graph
    uint64_t        stalled_us_   = 0; // the direct store's stall_us at the last lookup
};

} // namespace rotary
