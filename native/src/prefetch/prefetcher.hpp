// SPDX-License-Identifier: MIT
//
// Prefetcher: reads what the next layers will probably want while the disk has nothing else to do.
//
// prefetch/ knows what will be wanted: routers as graphs have them (router_finder.hpp) and applied early (router.hpp),
// predictors from routings alone (predictors/), which of them a pool uses and what they say (predictions.hpp), what
// following them is worth (gain.hpp), and the two that act on it: this one, for reads of the direct store, and device_prefetch.hpp,
// for copies of the link. A prediction is a hint; exactness does not rest on it. Called by exec/ at each lookup.
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
        const ggml_tensor *                 node;    // the multiplication that it is for
        const std::vector<paged_tensor *> & order;   // the layer's tensors as the graph uses them
        const std::vector<int32_t> &        experts; // distinct ones
        const std::vector<rotary_load> &    loads;   // absent ones, if all have slots
        bool                                in_slots;
    };

    void begin_graph() { looked_up_us_ = 0; } // what is between two graphs is no layer's time
    void begin_lookup(direct_store & store, int64_t n_tokens);
    void end_lookup();

    // How right the guesses at this lookup were, and what following them is worth.
    void learn(paged_model & model, predictions & predicted, const lookup & now);

    // Predict the next lookups and queue reads of what they will want.
    void predict(paged_model & model, predictions & predicted, const lookup & now);

  private:
    std::vector<const float *> apply_routers(predictions & predicted, const paged_layer & layer,
                                             const std::vector<paged_layer *> & layers, const ggml_tensor * input,
                                             int64_t n_tokens);
    void guess_at(const paged_layer & layer, layer_prediction & at, int distance, const std::vector<int32_t> & chosen,
                  std::vector<int32_t> & experts) const;

    router_products products_;
    prefetch_gain   gain_;
    uint64_t        looked_up_us_ = 0; // when the last lookup was done
    uint64_t        stalled_us_   = 0; // by the disk, until then
};

} // namespace rotary
