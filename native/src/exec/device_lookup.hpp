// SPDX-License-Identifier: MIT
//
// Device lookups: lookups that the inner device resolves itself. All is enqueued: the host learns neither the routing nor
// what was absent.
// Threading: one user thread at a time, under the lock of the pool that it runs over.

#pragma once

#include "pool/pool.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

namespace rotary {

class device_lookups {
  public:
    explicit device_lookups(ggml_backend_t inner) : inner_(inner) {}

    bool make_events(); // that these lookups need, unless they are there; false if there are none

    void        begin_graph() { any_ = false; }
    ggml_status resolve(pool & pool, paged_layer & layer, const ggml_tensor * node);

    // Wait until the link has come through this graph's last lookup, not for what is computed after it: a refusal has to
    // fail this graph, whose output is wrong, and figures are complete when it returns. False with this thread's error.
    bool end_graph(pool & pool);

  private:
    ggml_backend_t         inner_;
    ggml_backend_event_ptr computed_;    // the inner backend has come so far
    ggml_backend_event_ptr paged_;       // the link has come so far
    ggml_backend_event_ptr counted_;     // what the device has counted is with the host
    bool                   any_ = false; // of this graph's lookups
};

} // namespace rotary
