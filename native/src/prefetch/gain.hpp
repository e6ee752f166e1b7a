// SPDX-License-Identifier: MIT
//
// Prefetch gain: what predictions were worth so far, and so which of them to follow, and how many layers ahead.
// Threading: none of its own; the pool locks.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rotary {

// An expert predicted for a layer, and the place it has in the ranking.
struct guess {
    int32_t expert;
    int32_t rank;
};

// A wrong read keeps the disk from a right one for as long as a right one would have saved, so a rank is followed where it
// is right more often than not; and nothing is predicted where the reads that it saves take less time than predicting.
class prefetch_gain {
  public:
    static constexpr int n_distances = 4; // layers ahead, at most

    void learn(int distance, int32_t rank, bool right);
    void count_gain(double us);    // the disk's time for what a lookup missed and trusted guesses had named
    void count_cost(double us);    // of predicting once
    void count_read(size_t bytes); // prefetched for one layer
    void count_layer(double us);   // from one layer's lookup to the next, waits for the disk left out

    bool   trusts(int distance, int32_t rank) const;
    double layer_us() const { return layer_us_; }
    int depth(size_t window) const; // layers ahead that are worth predicting: as many as fill a window of so many bytes

    bool pays(); // whether to predict now: if not, then still from time to time, to see when it pays again

  private:
    std::vector<float> right_[n_distances]; // [rank] share of the guesses at absent experts that were right
    double             gain_us_    = 1000;
    double             cost_us_    = 0;
    double             read_bytes_ = 0;
    double             layer_us_   = 4000;
    uint64_t           skipped_    = 0;
};

} // namespace rotary
