// SPDX-License-Identifier: MIT
//
// Trace: routings as they happen, recorded for rotary_pool_trace_read(), which says how a record is laid out.
// Threading: any thread; see statistics.hpp.

#pragma once

#include "base/fork.hpp"

#include <atomic>
#include <cstdint>
#include <vector>

namespace rotary {

class routing_trace {
  public:
    void turn(bool on); // on: begins anew
    bool on() const { return on_; }

    // A routing of layer `il`, ids[n_tokens][n_used], with the router's weights or none, and which experts were resident.
    void record(int32_t il, int64_t n_used, const std::vector<int32_t> & ids, const std::vector<float> & weights,
                const std::vector<bool> & resident);

    // As rotary_pool_trace_read().
    int64_t read(int32_t * records, int64_t n, uint64_t & n_untraced);

  private:
    mutable fork_mutex   mutex_;
    std::atomic<bool>    on_{ false };
    std::vector<int32_t> records_;
    uint64_t             n_untraced_ = 0;
};

} // namespace rotary
