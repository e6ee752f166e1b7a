// SPDX-License-Identifier: MIT
//
// Segments. See segments.hpp.

#include "exec/segments.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

void graph_segments::begin_graph(uint64_t generation) {
    static constexpr size_t max_segments = 1024;

    if (generation_ != generation || segments_.size() > max_segments) {
        segments_.clear();
        generation_ = generation;
    }
}

void graph_segments::patch(ggml_tensor * node, ggml_tensor * weight, ggml_tensor * ids) {
    patched_.push_back({ node, node->src[0], node->src[2] });
    node->src[0] = weight;
    node->src[2] = ids;
}

ggml_status graph_segments::run(ggml_cgraph * graph, int i0, int i1) {
    ggml_status status = GGML_STATUS_SUCCESS;
    if (i0 < i1) {
        ggml_cgraph view = ggml_graph_view(graph, i0, i1);
        if (patched_.empty() && i1 - i0 == graph->n_nodes) {
            view.uid = graph->uid;
        } else if (graph->uid != 0) {
            auto known = std::find_if(segments_.begin(), segments_.end(), [&](const segment & each) {
                return each.graph == graph->uid && each.i0 == i0 && each.i1 == i1;
            });
            if (known == segments_.end()) {
                known = segments_.insert(known, { graph->uid, i0, i1, ggml_graph_next_uid() });
            }
            view.uid = known->uid;
        }
        status = ggml_backend_graph_compute_async(inner_, &view);
    }
    restore();
    return status;
}

void graph_segments::restore() {
    for (const patched_node & each : patched_) {
        each.node->src[0] = each.weight;
        each.node->src[2] = each.ids;
    }
    patched_.clear();
}

} // namespace rotary
