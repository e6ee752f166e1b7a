// SPDX-License-Identifier: MIT
//
// Experience: what foretelling was worth so far, and so what to follow, and how far ahead.
// Threading: none of its own; the pool locks.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rotary {

// An expert foretold for a layer, and its place in the ranking.
struct guess {
    int32_t expert;
    int32_t rank;
};

// What predictions were worth so far, and so which to follow. A wrong read keeps the disk from a right one for as long as
// a right one would have saved, so a rank is followed where it is right more often than not; and nothing is foretold
// where the reads that it foresees take less time than foretelling does.
class experience {
  public:
    static constexpr int n_distances = 4; // layers ahead, at the most

    void learn(int distance, int32_t rank, bool right);
    void count_gain(double us); // the disk's time for what a lookup missed and trusted guesses had named
    void count_cost(double us); // of foretelling once

    bool trusts(int distance, int32_t rank) const;
    void count_read(size_t bytes); // asked for ahead of one layer
    void count_layer(double us);   // from one layer's lookup to the next, waits for the disk left out

    double layer_us() const { return layer_us_; }
    // Layers ahead that are worth foretelling where reads ahead may take so many bytes: as many as fill them.
    int depth(size_t window) const;

    bool pays(); // whether to foretell now: if not, then still from time to time, to see when it does again

  private:
    std::vector<float> right_[n_distances]; // [rank] share of the guesses at absent experts that were right
    double             gain_us_    = 1000;
    double             cost_us_    = 0;
    double             read_bytes_ = 0;
    double             layer_us_   = 4000;
    uint64_t           skipped_    = 0;
};

} // namespace rotary
