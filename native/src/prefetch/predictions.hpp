// SPDX-License-Identifier: MIT
//
// Predictions: the predictor of a pool, and what it predicts for each layer's next lookup. Routers of the next layers are
// applied early; a predictor from routings serves where those cannot be had or another one is asked for.
// Threading: under the pool's lock, but for the name, which may be asked for at any time.

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
    std::string              predictor = automatic_predictor; // by name, or
    const rotary_predictor * own       = nullptr;
};

// What prefetch keeps of a layer.
struct layer_prediction {
    bool                        router_sought = false; // in the first graph
    router                      gate;                  // applied on the host
    std::vector<float>          norm;                  // applied on the device: [n_embd] weights of the norm before it
    std::vector<paged_tensor *> order;                 // the layer's tensors as the last graph used them
    std::vector<guess>          guesses[prefetch_gain::n_distances]; // at the next lookup, by layers ahead

    void forget_guesses();
};

class predictions : public target_source {
  public:
    predictions(paged_model & model, prefetch_config chosen) : model_(model), config_(std::move(chosen)) {}

    // Slots have been allocated. What a predictor has learnt stays when they are allocated anew.
    void start();
    void forget_guesses(); // at lookups that never came

    bool               on() const { return config_.on; }
    bool               applies_routers() const;
    predictor *        from_routings() const { return predictor_.get(); } // NULL if there is none
    layer_prediction & layer(const paged_layer & layer) { return layers_[layer.index]; }

    // Every routing that the host learns.
    void note(const paged_layer & layer, const std::vector<int32_t> & ids, int64_t n_used);

    // What a profile says of a layer of the model, for predictors that learn; as predictor::learn(). Call before slots are
    // allocated.
    void learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens);

    // A layer's router cannot be applied early: others predict, if they may.
    void router_missing(const paged_layer & layer, const std::string & why);

    // A slot of the layer's for an expert that is prefetched, evicting none of those that are predicted.
    char * claim(const stored_tensor & tensor, int32_t expert) override;

    std::string name() const; // "" where nothing predicts

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
    std::pair<size_t, int32_t>    made_for_; // layers and experts
    std::map<int32_t, profile>    profiles_; // by layer of the model, until there is a predictor
    bool                          missing_said_ = false;
    mutable fork_mutex            name_mutex_;
    std::string                   name_;
};

} // namespace rotary
