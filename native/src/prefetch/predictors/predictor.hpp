// SPDX-License-Identifier: MIT
//
// Predictor: predicts which experts the next layers will want, from routings alone. Pure logic, one predictor a file,
// chosen by name. Where they can be applied, the next layers' routers predict better (router.hpp).
// Threading: none of its own; the pool locks.

#pragma once

#include "rotary.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rotary {

class predictor {
  public:
    virtual ~predictor() = default;

    // Take a routing, ids[n_tokens][n_used]. A batch's layers come in order, numbered from 0 among the paged ones; a
    // layer that routes fewer tokens than the one before routes the last ones.
    virtual void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) = 0;

    // Start from a profile of a layer: popularity[n_expert] is the share of n_tokens that chose each expert;
    // pairs[from][to] is the share of the uses of expert `from` of the layer before that were followed by expert `to`
    // of this one. pairs and popularity_before are NULL if the layer before has no profile.
    virtual void learn(int32_t /* layer */, const float * /* popularity */, const float * /* pairs */,
                       const float * /* popularity_before */, int64_t /* n_tokens */) {}

    // After the routing of `layer`, name at most n experts that `ahead` will want for the last token, likeliest first.
    virtual void name(int32_t layer, int32_t ahead, int32_t n, std::vector<int32_t> & experts) = 0;
};

// Names the experts with scores above 0, highest first.
class scoring_predictor : public predictor {
  public:
    explicit scoring_predictor(int32_t n_expert) : n_expert_(n_expert) {}

    virtual bool score(int32_t layer, int32_t ahead, std::vector<double> & score) = 0; // [n_expert]; false: none

    void name(int32_t layer, int32_t ahead, int32_t n, std::vector<int32_t> & experts) override;

  protected:
    int32_t n_expert_;

  private:
    std::vector<double> score_;
};

struct predictor_setting {
    int32_t                  n_layers;
    int32_t                  n_expert; // of the largest layer
    const rotary_predictor * own;      // or NULL
};

std::unique_ptr<predictor>         previous_new(const predictor_setting & setting);
std::unique_ptr<predictor>         popular_new(const predictor_setting & setting);
std::unique_ptr<scoring_predictor> transition_new(const predictor_setting & setting);
std::unique_ptr<scoring_predictor> similar_new(const predictor_setting & setting);
std::unique_ptr<predictor>         mixed_new(const predictor_setting & setting);
std::unique_ptr<predictor>         own_predictor_new(const predictor_setting & setting); // the caller's

// The caller's own predictor if the setting has one, else the one of this name; NULL if the name is unknown.
std::unique_ptr<predictor> predictor_new(const std::string & name, const predictor_setting & setting);
const char *               predictor_names(); // "previous,popular,..."
bool                       predictor_known(const std::string & name);
std::string                predictor_not_known(const std::string & name);

// "auto" and "router" apply the next layers' routers; where that is impossible, "auto" uses best_without_router.
static constexpr const char * automatic_predictor = "auto";
static constexpr const char * router_predictor    = "router";
static constexpr const char * best_without_router = "mixed";

} // namespace rotary
