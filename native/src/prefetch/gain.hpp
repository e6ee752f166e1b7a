// SPDX-License-Identifier: MIT
//
// Prefetch gain: what predictions have been worth, and therefore which ones to follow and how many layers ahead.
// Threading: none of its own; the pool locks.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rotary {

// An expert predicted for a layer, and its rank, 0 for the likeliest.
struct guess {
    int32_t expert;
    int32_t rank;
};

// A wrong prefetch costs the disk as much time as a right one saves, so a rank is followed if it is right more often
// than not. Nothing is predicted while predicting takes longer than the reads that it saves.
class prefetch_gain {
  public:
    static constexpr int n_distances = 4; // layers ahead, at most

    void learn(int distance, int32_t rank, bool right);
    void count_gain(double us);    // time for reading a lookup's misses that trusted guesses had named
    void count_cost(double us);    // time of predicting at one lookup
    void count_read(size_t bytes); // prefetched for one layer
    void count_layer(double us);   // from one layer's lookup to the next, without waits for the disk

    bool   trusts(int distance, int32_t rank) const;
    double layer_us() const { return layer_us_; }
    int    depth(size_t window) const; // layers ahead to predict: enough to fill a window of so many bytes

    bool pays(); // whether to predict now; if it does not pay, true every 16th time, to notice when it does

  private:
    std::vector<float> right_[n_distances]; // [rank] share of right guesses among those of absent experts
    double             gain_us_    = 1000;
    double             cost_us_    = 0;
    double             read_bytes_ = 0;
    double             layer_us_   = 4000;
    uint64_t           skipped_    = 0;
};

} // namespace rotary
