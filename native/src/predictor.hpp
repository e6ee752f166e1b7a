// SPDX-License-Identifier: MIT
//
// Predictor: which experts a layer will probably choose, from the hidden state that an earlier layer's experts get: the
// later layer's router applied early. A hint only; exactness does not rest on it.
// Idea: Eliseev and Mazur, "Fast inference of mixture-of-experts language models with offloading", arXiv 2312.17238.
// Threading: none of its own; the pool locks.

#pragma once

#include <cstdint>
#include <vector>

namespace rotary {

// A layer's router as it is applied early: rows of int8 with a scale each, the norm's weights folded in. A quarter of
// the bytes of F32 that this would otherwise take from the caches, and precise enough to rank experts.
class router {
  public:
    bool    known() const { return n_expert_ > 0; }
    int64_t n_embd() const { return (int64_t) norm_.size(); }

    // weight[n_embd, n_expert]; norm[n_embd]: the weights of the norm before it, or empty; bias[n_expert] on the logits,
    // or empty; selection[n_expert] added to the sigmoid of the logits for choosing, or empty.
    void set(const std::vector<float> & weight, const std::vector<float> & norm, const std::vector<float> & bias,
             const std::vector<float> & selection, int64_t n_embd);

    // hidden[n_embd] as this layer's router gets it -> the same before its norm's weights.
    void unweight(const float * hidden, float * normed) const;

    // The n_used experts that this router ranks highest for `normed`, best first.
    void choose(const float * normed, int32_t n_used, std::vector<int32_t> & experts);

  private:
    int32_t             n_expert_ = 0;
    std::vector<int8_t> rows_;  // [n_embd, n_expert]
    std::vector<float>  scale_; // [n_expert]
    std::vector<float>  norm_;  // [n_embd]
    std::vector<float>  bias_, selection_;
    std::vector<float>  score_;
};

} // namespace rotary
