// SPDX-License-Identifier: MIT
//
// Slot filler: copies experts from the store into slots, in the slots' layout. On a host inner device, a custom
// operation copies with all of the inner backend's threads; elsewhere the link copies beside computation or, without a
// link, the inner backend copies. An expert that was read straight into its slot needs no copy.
// Threading: none of its own; the pool locks.

#pragma once

#include "base/inner_device.hpp"
#include "link/transfer.hpp"
#include "stats/statistics.hpp"
#include "store/expert_store.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <atomic>
#include <vector>

namespace rotary {

// One slot as a tensor of its own: a repacking buffer accepts whole tensors only.
ggml_tensor slot_view(const ggml_tensor & slots, int32_t slot);

struct fill_job {
    const stored_tensor * tensor;
    const ggml_tensor *   slots; // of that tensor
    int32_t               expert;
    int32_t               slot;

    ggml_tensor target() const { return slot_view(*slots, slot); }
};

class slot_filler {
  public:
    explicit slot_filler(ggml_backend_t inner);

    // Do the jobs, waiting for reads where needed; experts that have landed are copied while others are in flight. On
    // failure this thread's error says why, and some slots may have been written.
    ggml_status fill(expert_store & store, transfer & transfer, statistics & stats, const std::vector<fill_job> & jobs);

    bool make_event() { return rotary::make_event(copied_, inner_); } // for copies by a link; see base/inner_device.hpp

  private:
    // Rows [first, last) of a job, for one thread.
    struct piece {
        const fill_job * job;
        const char *     bytes;
        int64_t          first, last;
    };

    static void copy(const piece & piece);
    ggml_status copy_by_link(transfer & transfer);
    static void work(ggml_tensor * dst, int ith, int nth, void * self);
    ggml_status copy_all(transfer & transfer);

    ggml_backend_t         inner_;
    ggml_backend_event_ptr copied_;       // by the link, recorded after its last copy
    ggml_context_ptr       context_;
    ggml_cgraph *       graph_ = nullptr; // of one node that copies all pieces; NULL if the inner backend cannot run it
    float               node_data_[4] = {};
    std::vector<piece>  pieces_;
    std::atomic<size_t> next_{ 0 };
};

} // namespace rotary
