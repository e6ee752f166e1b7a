// SPDX-License-Identifier: MIT
//
// Predictions: a pool's predictor, and what it predicts for each layer's next lookup. By default the next layers'
// routers are applied early; a predictor from routings is used where that is impossible or where one is asked for.
// Threading: under the pool's lock, except name(), which may be called at any time.

#pragma once

#include "base/fork.hpp"
#include "model/paged_model.hpp"
#include "prefetch/gain.hpp"
#include "prefetch/predictors/predictor.hpp"
#include "prefetch/router.hpp"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace rotary {

struct prefetch_config {
    bool                     on        = true;
    std::string              predictor = automatic_predictor; // name
    const rotary_predictor * own       = nullptr;             // the caller's, instead
};

// What prefetch keeps for each layer.
struct layer_prediction {
    bool                        router_sought = false; // once, in the first graph
    router                      gate;                  // if it is applied on the host
    std::vector<float>          norm;  // [n_embd] weights before the router, if it is applied on the device
    std::vector<paged_tensor *> order; // the layer's tensors, in the last graph's order of use
    std::vector<guess>          guesses[prefetch_gain::n_distances]; // for the next lookup, [layers ahead - 1]

    void forget_guesses();
};

class predictions : public target_source {
  public:
    predictions(paged_model & model, prefetch_config chosen) : model_(model), config_(std::move(chosen)) {}

    // Call when slots have been allocated. A predictor keeps what it has learnt when they are allocated anew.
    void start();
    void forget_guesses(); // for lookups that never came

    bool               on() const { return config_.on; }
    bool               applies_routers() const;
    predictor *        from_routings() const { return predictor_.get(); } // NULL if there is none
    layer_prediction & layer(const paged_layer & layer) { return layers_[layer.index]; }

    // Call with every routing that the host reads.
    void note(const paged_layer & layer, const std::vector<int32_t> & ids, int64_t n_used);

    // Take a profile of the model's layer `il`, for predictors that learn; arguments as in rotary_pool_learn(). Call
    // before slots are allocated.
    void learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens);

    // Call if a layer's router cannot be applied early: the best predictor from routings takes over, if it may.
    void router_missing(const paged_layer & layer, const std::string & why);

    // A read target for a prefetched expert, reserved without evicting predicted ones; NULL: the staging area.
    char * claim(const stored_tensor & tensor, int32_t expert) override;

    std::string name() const; // "" if nothing is predicted

  private:
    struct profile {
        std::vector<float> popularity, pairs; // [n_expert], [n_expert][n_expert]
        int64_t            n_tokens;
    };

    void make(const std::string & predictor);
    void set_name(const std::string & name);

    paged_model &                 model_;
    const prefetch_config         config_;
    std::vector<layer_prediction> layers_;   // by the layer's index
    std::unique_ptr<predictor>    predictor_;
    std::pair<size_t, int32_t>    made_for_; // number of layers, of experts
    std::map<int32_t, profile>    profiles_; // by the model's layer number, until a predictor has learnt them
    bool                          missing_said_ = false;
    mutable fork_mutex            name_mutex_;
    std::string                   name_;
};

} // namespace rotary
