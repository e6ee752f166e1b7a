// SPDX-License-Identifier: MIT
//
// Trace: recorded routings for rotary_pool_trace_read(), which documents the layout of a record.
// Threading: any thread; see statistics.hpp.

#pragma once

#include "base/fork.hpp"

#include <atomic>
#include <cstdint>
#include <vector>

namespace rotary {

class routing_trace {
  public:
    void enable(bool on); // turning it on drops older records
    bool on() const { return on_; }

    // Record a routing of layer `il`, ids[n_tokens][n_used], with each id's router weight (or none) and its residency.
    void record(int32_t il, int64_t n_used, const std::vector<int32_t> & ids, const std::vector<float> & weights,
                const std::vector<bool> & resident);

    // Contract: rotary_pool_trace_read() in rotary.h.
    int64_t read(int32_t * records, int64_t n, uint64_t & n_untraced);

  private:
    mutable fork_mutex   mutex_;
    std::atomic<bool>    on_{ false };
    std::vector<int32_t> records_;
    uint64_t             n_untraced_ = 0;
};

} // namespace rotary
