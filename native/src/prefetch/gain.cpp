// SPDX-License-Identifier: MIT
//
// Prefetch gain. See gain.hpp.

#include "prefetch/gain.hpp"

#include <algorithm>

namespace rotary {

void prefetch_gain::learn(int distance, int32_t rank, bool right) {
    static constexpr float at_first = 0.6f, weight = 1.0f / 64;

    std::vector<float> & shares = right_[distance];
    if ((size_t) rank >= shares.size()) {
        shares.resize(rank + 1, at_first);
    }
    shares[rank] += ((right ? 1.0f : 0.0f) - shares[rank]) * weight;
}

bool prefetch_gain::trusts(int distance, int32_t rank) const {
    return (size_t) rank >= right_[distance].size() || right_[distance][rank] > 0.5f;
}

void prefetch_gain::count_gain(double us) {
    gain_us_ += (us - gain_us_) / 64;
}

void prefetch_gain::count_cost(double us) {
    cost_us_ += (us - cost_us_) / 64;
}

void prefetch_gain::count_read(size_t bytes) {
    read_bytes_ += ((double) bytes - read_bytes_) / 16;
}

void prefetch_gain::count_layer(double us) {
    layer_us_ += (us - layer_us_) / 16;
}

int prefetch_gain::depth(size_t window) const {
    const double layers = (double) window / std::max(read_bytes_, 1.0);
    return (int) std::clamp(layers, 1.0, (double) n_distances);
}

bool prefetch_gain::pays() {
    static constexpr uint64_t look_again = 16;

    const bool pays = gain_us_ > cost_us_;
    skipped_        = pays ? 0 : skipped_ + 1;
    return pays || skipped_ % look_again == 0;
}

} // namespace rotary
