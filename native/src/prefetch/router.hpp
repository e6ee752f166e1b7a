// SPDX-License-Identifier: MIT
//
// Router: predicts which experts a layer will choose, from the hidden state that an earlier layer's experts get, by applying
// the later layer's router early. A hint only; exactness does not rest on it.
// Idea: Eliseev and Mazur, "Fast inference of mixture-of-experts language models with offloading", arXiv 2312.17238.
// Threading: none of its own; the pool locks.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace rotary {

// A layer's router as it is applied early: in Q8_0, the norm's weights folded in. A quarter of the bytes of F32 that it
// would otherwise take from the caches, and precise enough to rank experts.
class router {
  public:
    bool    known() const { return n_expert_ > 0; }
    int64_t n_embd() const { return (int64_t) norm_.size(); }
    int32_t n_expert() const { return n_expert_; }

    // weight[n_embd, n_expert]; norm[n_embd]: the weights of the norm before it, or empty; bias[n_expert] on the logits,
    // or empty; selection[n_expert] added to the sigmoid of the logits for choosing, or empty.
    void set(const std::vector<float> & weight, const std::vector<float> & norm, const std::vector<float> & bias,
             const std::vector<float> & selection, int64_t n_embd);

    // hidden[n_embd] as this layer's router gets it -> the same before its norm's weights.
    void unweight(const float * hidden, float * normed) const;

    // The n_used experts ranked highest by the products of weight and state, best first.
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

// Multiplies a state with several routers, on the CPU with the backend's own kernels and threads.
class router_products {
  public:
    explicit router_products(ggml_backend_t inner);

    // normed[n_embd, n_tokens] -> for each router its products[n_expert, n_tokens], valid until the next call; false if
    // it could not be computed.
    bool multiply(const std::vector<router *> & routers, std::vector<float> & normed, int64_t n_tokens,
                  std::vector<const float *> & products);

  private:
    ggml_backend_t     cpu_; // the inner backend if that is the CPU's, else our own
    ggml_backend_ptr   own_;
    ggml_context_ptr   context_;
    std::vector<float> products_;
};

} // namespace rotary
