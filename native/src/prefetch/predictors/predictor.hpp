// SPDX-License-Identifier: MIT
//
// Predictor: which experts the next layers will want, from routings alone. Pure logic, one predictor a file, chosen by
// name. A hint only; exactness does not rest on it. What is known better, the next layers' routers, is router.hpp.
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

    // A routing when it is made, ids[n_tokens][n_used]. A batch's layers come in order, numbered from 0 among those that
    // are paged; where a layer routes fewer tokens than the one before, they are the last ones.
    virtual void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) = 0;

    // Begin with what a profile says of a layer: the share of n_tokens that chose each expert, popularity[n_expert], and
    // pairs[n_expert][n_expert], how often the later expert was chosen with one of the layer before, of the latter's uses.
    virtual void learn(int32_t /* layer */, const float * /* popularity */, const float * /* pairs */,
                       const float * /* popularity_before */, int64_t /* n_tokens */) {}

    // After the routing of `layer`: what `ahead` will want for the last token, likeliest first, at most n.
    virtual void name(int32_t layer, int32_t ahead, int32_t n, std::vector<int32_t> & experts) = 0;
};

// Gives each expert a score; those above 0 are named.
class scoring_predictor : public predictor {
  public:
    explicit scoring_predictor(int32_t n_expert) : n_expert_(n_expert) {}

    virtual bool score(int32_t layer, int32_t ahead, std::vector<double> & score) = 0; // [n_expert]; false: no idea

    void name(int32_t layer, int32_t ahead, int32_t n, std::vector<int32_t> & experts) override;

  protected:
    int32_t n_expert_;

  private:
    std::vector<double> score_;
};

struct predictor_setting {
    int32_t                  n_layers;
    int32_t                  n_expert; // of the largest
    const rotary_predictor * own;      // or NULL
};

// One a file.
std::unique_ptr<predictor>         previous_new(const predictor_setting & setting);
std::unique_ptr<predictor>         popular_new(const predictor_setting & setting);
std::unique_ptr<scoring_predictor> transition_new(const predictor_setting & setting);
std::unique_ptr<scoring_predictor> similar_new(const predictor_setting & setting);
std::unique_ptr<predictor>         mixed_new(const predictor_setting & setting);
std::unique_ptr<predictor>         own_predictor_new(const predictor_setting & setting); // the caller's

// The caller's own if the setting has one, else by name; NULL if there is none of this name.
std::unique_ptr<predictor> predictor_new(const std::string & name, const predictor_setting & setting);
const char *               predictor_names(); // "previous,popular,..."
bool                       predictor_known(const std::string & name);
std::string                predictor_not_known(const std::string & name);

// Not predictors from routings: "auto" and "router", the next layers' routers; and the best one where those cannot be had.
static constexpr const char * automatic_predictor = "auto";
static constexpr const char * router_predictor    = "router";
static constexpr const char * best_without_router = "mixed";

} // namespace rotary
