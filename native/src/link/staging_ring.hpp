// SPDX-License-Identifier: MIT
//
// Staging ring: a small pinned ring through which pageable memory reaches a device. A few threads fill it, so that a
// page fault in one piece does not hold up the others, and the device's copies run beside them.
// Threading: one user thread at a time.

#pragma once

#include "link/link.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace rotary {

class staging_ring {
  public:
    static constexpr size_t block_bytes = 1 << 20;
    static constexpr size_t n_blocks    = 16;

    // NULL with the reason; else `reason` says why there are fewer threads than wanted, or is "".
    static std::unique_ptr<staging_ring> open(std::shared_ptr<link> over, ggml_backend_dev_t inner,
                                              std::string & reason);

    ~staging_ring();
    staging_ring(const staging_ring &)             = delete;
    staging_ring & operator=(const staging_ring &) = delete;

    struct piece {
        char *       to;    // on the device
        const char * from;
        size_t       bytes; // at most block_bytes
    };
    // Returns once all pieces are read and their copies enqueued on the link; false with this thread's error.
    bool copy(const std::vector<piece> & pieces);

  private:
    struct block {
        char *                 memory;
        ggml_backend_event_ptr copied; // to the device: recorded after the block's last copy
        bool                   used = false;
    };

    explicit staging_ring(std::shared_ptr<link> over) : link_(std::move(over)) {}

    bool set_up(ggml_backend_dev_t inner, std::string & reason);
    void work();

    std::shared_ptr<link>    link_;
    link::pinned             memory_;
    std::vector<block>       blocks_;
    std::vector<std::thread> threads_;
    std::mutex               mutex_; // guards all below; a block belongs to the thread that took it from free_
    std::condition_variable  changed_;
    std::vector<piece>       pieces_;
    size_t                   next_ = 0; // next piece to take
    size_t                   left_ = 0; // pieces not yet enqueued
    std::vector<size_t>      free_;     // blocks, least recently used first
    std::string              failure_;  // of the first copy that failed, else ""
    bool                     ending_ = false;
};

} // namespace rotary
