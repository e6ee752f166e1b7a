// SPDX-License-Identifier: MIT
//
// Trace. See trace.hpp.

#include "stats/trace.hpp"

#include <algorithm>
#include <cstring>

namespace rotary {

void routing_trace::enable(bool on) {
    const std::lock_guard<std::mutex> lock(mutex_);
    on_ = on;
    if (on) {
        records_.clear();
        n_untraced_ = 0;
    }
}

void routing_trace::record(int32_t il, int64_t n_used, const std::vector<int32_t> & ids,
                           const std::vector<float> & weights, const std::vector<bool> & resident) {
    static constexpr size_t max_bytes = 64u << 20; // limit if nobody reads the records

    const std::lock_guard<std::mutex> lock(mutex_);
    if ((records_.size() + 3 * ids.size() + 4) * sizeof(int32_t) > max_bytes) {
        n_untraced_++;
        return;
    }
    records_.insert(records_.end(), { il, (int32_t) (ids.size() / n_used), (int32_t) n_used, !weights.empty() });
    records_.insert(records_.end(), ids.begin(), ids.end());
    for (size_t i = 0; i < ids.size(); i++) {
        int32_t bits = 0;
        memcpy(&bits, weights.empty() ? (const void *) &bits : &weights[i], sizeof(bits));
        records_.push_back(bits);
    }
    records_.insert(records_.end(), resident.begin(), resident.end());
}

int64_t routing_trace::read(int32_t * records, int64_t n, uint64_t & n_untraced) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto                        size = (int64_t) records_.size();
    n_untraced                             = n_untraced_;
    if (n >= size) {
        std::copy(records_.begin(), records_.end(), records);
        records_.clear();
    }
    return size;
}

} // namespace rotary
