// SPDX-License-Identifier: MIT
//
// Transfer: how experts get from the store to an inner device with memory of its own: by a link beside computation, out of
// pinned memory or through a ring of it; or, without a link, by the inner backend's copies, which the host waits for.
//
// link/ owns the way to the device: the link's library (link.hpp, link_api.h, cuda_link.cu), pinned memory
// (pinned_store.hpp, staging_ring.hpp), page tables in the device's memory (device_tables.hpp), and the copying of experts
// into slots (slot_filler.hpp), a host inner device's too. Called by model/ (sizing) and exec/ (lookups). It knows tensors
// and slot tables, neither layers nor graphs.
// Threading: none of its own, the pool locks; link and ring have threads behind them.

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
    transfer(ggml_backend_dev_t inner, std::string model, pin_policy pin, expert_store & store, notices & said,
             statistics & stats) :
        inner_(inner), model_(std::move(model)), store_(store), said_(said), stats_(stats), pinned_(pin) {}

    // Open the link to an inner device with memory of its own, if there is one, and pin what may be pinned of these tensors.
    void open(const std::vector<const stored_tensor *> & tensors);

    link * over() const { return link_.get(); }   // NULL if there is none
    bool   is_used() const { return uses_link_; } // else the inner backend copies, and the host waits
    bool   synchronize() const;                   // waits for what the link does, if there is one

    staging_ring *       ring();                  // NULL, with this thread's error, if it cannot be had
    pinned_store &       pinned() { return pinned_; }
    const pinned_store & pinned() const { return pinned_; }

    // Where the bytes that the store gave of an expert lie in pinned memory; NULL if they do not.
    const char * pinned_at(const stored_tensor & tensor, int32_t expert, const char * fetched) const;

    void abandon(); // in a forked child, where the ring's threads are not

  private:
    ggml_backend_dev_t            inner_;
    std::string                   model_; // name for messages
    expert_store &                store_;
    notices &                     said_;
    statistics &                  stats_;
    std::shared_ptr<link>         link_;
    std::unique_ptr<staging_ring> ring_;   // NULL where everything that is copied is pinned
    bool                          uses_link_ = false;
    pinned_store                  pinned_; // after the link: unpinned before it closes
};

} // namespace rotary
