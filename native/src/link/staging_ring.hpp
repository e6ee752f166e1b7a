// SPDX-License-Identifier: MIT
//
// Ring: a little page-locked memory through which pageable memory reaches a device, filled by a few threads, so that a
// page fault in one piece does not hold up the others and the device's copies run beside them.
// Threading: one user thread at a time.

#pragma once

#include "link/link.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace rotary {

class staging_ring {
  public:
    static constexpr size_t block_bytes = 1 << 20;
    static constexpr size_t n_blocks    = 16;

    staging_ring(std::shared_ptr<link> side, ggml_backend_dev_t inner, std::string & reason);
    ~staging_ring();
    staging_ring(const staging_ring &)             = delete;
    staging_ring & operator=(const staging_ring &) = delete;

    bool ok() const { return !threads_.empty(); } // else with the reason

    // Why there are fewer threads than there should be; "" if there are as many.
    const std::string & why() const { return why_fewer_; }

    struct piece {
        char *       to;    // on the device
        const char * from;
        size_t       bytes; // a block's at the most
    };
    // Returns once all pieces are read, their copies enqueued on the link; false with this thread's error.
    bool copy(const std::vector<piece> & pieces);

  private:
    struct block {
        char *                 memory;
        ggml_backend_event_ptr copied; // to the device
        bool                   used = false;
    };

    void work();

    std::shared_ptr<link>    link_;
    link::locked             memory_;
    std::vector<block>       blocks_;
    std::vector<std::thread> threads_;
    std::string              why_fewer_;
    std::mutex               mutex_; // of all below, and of a block's turn
    std::condition_variable  changed_;
    std::vector<piece>       pieces_;
    size_t                   next_ = 0; // piece to be taken
    size_t                   left_ = 0; // pieces not yet enqueued
    std::vector<size_t>      free_;     // blocks, the one used longest ago first
    bool                     failed_ = false;
    std::string              why_;
    bool                     ending_ = false;
};

} // namespace rotary
