// SPDX-License-Identifier: MIT
//
// Device lookups: lookups that the inner device resolves itself. The host only enqueues work, so it sees neither the
// routing nor which experts were absent.
// Threading: one user thread at a time, under the lock of the pool that it runs over.

#pragma once

#include "pool/pool.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

namespace rotary {

class device_lookups {
  public:
    explicit device_lookups(ggml_backend_t inner) : inner_(inner) {}

    bool make_events(); // create the events below, once; false if the inner device gives none

    void        begin_graph() { any_ = false; }
    ggml_status resolve(pool & pool, paged_layer & layer, const ggml_tensor * node);

    // Wait until the link has finished this graph's last lookup, but not for the computation after it. A refused lookup
    // then fails this graph, whose output is wrong, and statistics are complete. False with this thread's error.
    bool end_graph(pool & pool);

  private:
    ggml_backend_t         inner_;
    ggml_backend_event_ptr computed_;    // recorded on the inner backend once the routing is computed
    ggml_backend_event_ptr paged_;       // recorded on the link once the lookup's experts are in their slots
    ggml_backend_event_ptr counted_;     // recorded on the link once the device's counters are copied to the host
    bool                   any_ = false; // this graph has a device lookup
};

} // namespace rotary
