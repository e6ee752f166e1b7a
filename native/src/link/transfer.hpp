// SPDX-License-Identifier: MIT
//
// Transfer: moves experts from the store to an inner device with memory of its own: by a link beside computation, from
// pinned memory or through a pinned ring; or, without a link, by the inner backend's copies, for which the host waits.
//
// link/ owns the way to the device: the link's library (link.hpp, link_api.h, cuda_link.cu), pinned memory
// (pinned_store.hpp, staging_ring.hpp), page tables in the device's memory (device_tables.hpp), and copying experts
// into slots (slot_filler.hpp), also for a host inner device. Called by model/ (sizing), prefetch/ (its tables), pool/ and
// exec/ (lookups). It knows tensors and slot tables, but no graphs.
// Threading: none of its own, the pool locks; the ring has threads.

#pragma once

#include "link/link.hpp"
#include "link/pinned_store.hpp"
#include "link/staging_ring.hpp"
#include "stats/notices.hpp"
#include "stats/statistics.hpp"
#include "store/expert_store.hpp"

#include <memory>
#include <string>
#include <vector>

namespace rotary {

class transfer {
  public:
    transfer(ggml_backend_dev_t inner, std::string model, pin_policy pin, expert_store & store, notices & notices,
             statistics & stats) :
        inner_(inner), model_(std::move(model)), store_(store), notices_(notices), stats_(stats), pinned_(pin) {}

    // Open the link to the inner device, if any; pin these tensors' experts, or the staging area of the direct store.
    void open(const std::vector<const stored_tensor *> & tensors);

    link * over() const { return link_.get(); }   // NULL if there is none
    bool   is_used() const { return uses_link_; } // else the inner backend copies and the host waits
    bool   synchronize() const;                   // waits for the link, if there is one

    staging_ring *       ring();                  // opened on first use; NULL with this thread's error
    pinned_store &       pinned() { return pinned_; }
    const pinned_store & pinned() const { return pinned_; }

    // The pinned bytes of an expert that the store fetched to `fetched`; NULL if they are not pinned.
    const char * pinned_at(const stored_tensor & tensor, int32_t expert, const char * fetched) const;

    void abandon(); // in a forked child, which lacks the ring's threads

  private:
    ggml_backend_dev_t            inner_;
    std::string                   model_; // name for messages
    expert_store &                store_;
    notices &                     notices_;
    statistics &                  stats_;
    std::shared_ptr<link>         link_;
    std::unique_ptr<staging_ring> ring_;   // NULL where everything that is copied is pinned
    bool                          uses_link_ = false;
    pinned_store                  pinned_; // after the link: unpinned before it closes
};

} // namespace rotary
