// SPDX-License-Identifier: MIT
//
// Segments: parts of a graph that each run on the inner backend as one graph, within which it can fuse and capture
// nodes. A segment keeps its uid when llama.cpp runs the same graph again, so that captured graphs stay valid.
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

    void begin_graph(uint64_t generation); // another generation: slots or ids have moved, so uids change

    // Point a node at other tensors until the next run() or restore().
    void patch(ggml_tensor * node, ggml_tensor * weight, ggml_tensor * ids);

    ggml_status run(ggml_cgraph * graph, int i0, int i1); // nodes [i0, i1)

    // Undo all patches: llama.cpp owns the graph and may reuse it. The inner backend has read the nodes by then.
    void restore();

  private:
    struct patched_node {
        ggml_tensor * node;
        ggml_tensor * weight;
        ggml_tensor * ids;
    };
    struct segment {
        uint64_t graph; // llama.cpp's uid
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
