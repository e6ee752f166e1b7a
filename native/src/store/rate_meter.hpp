// SPDX-License-Identifier: MIT
//
// Rate meter: how fast reads are, several of which are in flight at a time. It measures over spans, from the first of
// the reads in flight to the end of the last. It reads no clock.
// Threading: none of its own; the pool locks.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace rotary {

class rate_meter {
  public:
    void begin(size_t bytes, uint64_t now_us) { // a read
        since_us_ = bytes_ == 0 ? now_us : since_us_;
        bytes_ += bytes;
    }

    // No read is in flight any more; returns how long the span was. Reads that land between calls are noticed late:
    // unless the span ended in a wait, it shows a lower bound.
    uint64_t end(uint64_t now_us, bool waited) {
        const uint64_t span_us = std::max<uint64_t>(now_us - since_us_, 1);
        const double   seen    = (double) bytes_ / (double) span_us;
        if (waited || seen > bytes_per_us_) {
            bytes_per_us_ += (seen - bytes_per_us_) / 8;
        }
        bytes_ = 0;
        return span_us;
    }

    double bytes_per_us() const { return bytes_per_us_; }

  private:
    double   bytes_per_us_ = 1000; // a guess at first
    uint64_t since_us_     = 0;    // when the span began
    uint64_t bytes_        = 0;    // requested since then; 0: nothing is in flight
};

} // namespace rotary
