// SPDX-License-Identifier: MIT
//
// Segments: parts of a graph that run on the inner backend in one piece, in which it can fuse and capture. A part keeps its
// uid while llama.cpp runs the same graph again, so that captured graphs stay valid.
// Threading: one user thread at a time.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace rotary {

class graph_segments {
  public:
    explicit graph_segments(ggml_backend_t inner) : inner_(inner) {}

    void begin_graph(uint64_t generation); // uids of another generation are forgotten

    // Point a node that is yet to run at other tensors, until it has run or restore() is called.
    void patch(ggml_tensor * node, ggml_tensor * weight, ggml_tensor * ids);

    ggml_status run(ggml_cgraph * graph, int i0, int i1); // nodes [i0, i1)

    // The graph belongs to llama.cpp, which may build on it; the inner backend has taken what it needs.
    void restore();

  private:
    struct patched_node {
        ggml_tensor * node;
        ggml_tensor * weight;
        ggml_tensor * ids;
    };
    struct segment {
        uint64_t graph; // uid
        int      i0;
        int      i1;
        uint64_t uid;
    };

    ggml_backend_t            inner_;
    std::vector<patched_node> patched_;
    std::vector<segment>      segments_;
    uint64_t                  generation_ = 0;
};

} // namespace rotary
