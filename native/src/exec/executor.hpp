// SPDX-License-Identifier: MIT
//
// Executor: runs a compute graph on the inner backend, stopping at each expert lookup to page in the experts it wants.
//
// A graph runs in segments (segments.hpp). A segment ends before a MUL_MAT_ID whose routing is not known yet: the ids
// are read back, the experts they name are paged in (lookup.hpp), and the node's weight is replaced by the layer's
// slots, its ids by slot numbers. gate, up and down share one ids tensor, so this happens once a layer, and the nodes
// up to the next layer's lookup form the next segment. A batch that wants more distinct experts than there are slots
// runs either straight from the mapping (host inner device, plain layout) or in several passes (waves.hpp). Where the
// inner device resolves lookups itself, nothing is read back (device_lookup.hpp).
//
// exec/ owns the state of one backend's current graph. Only ggml/ calls it.
// Threading: one graph at a time for each executor; the lock of the pool that a graph runs over is held throughout.

#pragma once

#include "base/fork.hpp"
#include "exec/lookup.hpp"
#include "exec/segments.hpp"
#include "pool/pool.hpp"

#include "ggml-backend-impl.h"

#include <memory>
#include <vector>

namespace rotary {

// The pool that pages this weight, NULL if none does. Implemented by ggml/.
using pool_of_weight = std::shared_ptr<pool> (*)(const ggml_tensor * weight);

class executor {
  public:
    executor(ggml_backend_t inner, pool_of_weight find) :
        inner_(inner), find_(find), segments_(inner), lookup_(inner) {}
    ~executor();

    ggml_status compute(ggml_cgraph * graph);

  private:
    bool        can_compute_here() const;
    ggml_status compute_paged(ggml_cgraph * graph);
    ggml_status run_over(pool & pool, ggml_cgraph * graph);
    ggml_status run_nodes(pool & pool, ggml_cgraph * graph);
    ggml_status run_paged_node(pool & pool, ggml_cgraph * graph, int i, int & i0);

    ggml_backend_t                   inner_;
    pool_of_weight                   find_;
    const uint32_t                   made_in_ = fork_generation();
    graph_segments                   segments_;
    lookup                           lookup_;
    std::vector<std::weak_ptr<pool>> pools_; // pools this backend has run over
};

} // namespace rotary
