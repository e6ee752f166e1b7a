// SPDX-License-Identifier: MIT
//
// Router: predicts which experts a layer will choose by applying its router early, to the hidden state that an earlier
// layer's experts get.
// Idea: Eliseev and Mazur, "Fast inference of mixture-of-experts language models with offloading", arXiv 2312.17238.
// Threading: none of its own; the pool locks.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace rotary {

// A copy of a layer's router with the norm's weights folded in. It is Q8_0 where n_embd allows, which is precise enough
// to rank experts and takes a quarter of F32's room in the CPU caches.
class router {
  public:
    bool    known() const { return n_expert_ > 0; }
    int64_t n_embd() const { return (int64_t) norm_.size(); }
    int32_t n_expert() const { return n_expert_; }

    // weight[n_embd, n_expert]. Empty where a model has none: norm[n_embd], the weights of the norm before the router;
    // bias[n_expert], added to the logits; selection[n_expert], added to the sigmoid of the logits for choosing.
    void set(const std::vector<float> & weight, const std::vector<float> & norm, const std::vector<float> & bias,
             const std::vector<float> & selection, int64_t n_embd);

    // Divide this layer's norm weights out of hidden[n_embd], the state that this layer's router gets.
    void unweight(const float * hidden, float * normed) const;

    // The n_used experts that products[n_expert] of weight and state rank highest, best first.
    void choose(const float * products, int32_t n_used, std::vector<int32_t> & experts) const;

    ggml_type type() const { return type_; }
    char *    weight() { return weight_.data(); } // [n_embd, n_expert] of type()

  private:
    int32_t            n_expert_ = 0;
    ggml_type          type_     = GGML_TYPE_F32;
    std::vector<char>  weight_;
    std::vector<float> norm_; // [n_embd]
    std::vector<float> bias_, selection_;
};

// Multiplies states with several routers on the CPU backend.
class router_products {
  public:
    explicit router_products(ggml_backend_t inner);

    // For each router, its products[n_expert, n_tokens] with normed[n_embd, n_tokens], valid until the next call. False
    // if they cannot be computed.
    bool multiply(const std::vector<router *> & routers, std::vector<float> & normed, int64_t n_tokens,
                  std::vector<const float *> & products);

  private:
    ggml_backend_t     cpu_; // the inner backend if it is the CPU's, else own_
    ggml_backend_ptr   own_;
    ggml_context_ptr   context_;
    std::vector<float> products_;
};

} // namespace rotary
