// SPDX-License-Identifier: MIT
//
// Staging area: a piece of memory for reads in flight. Blocks are whole units, first fit; freed neighbours are merged.
// Threading: none of its own; the pool locks.

#pragma once

#include <cstddef>
#include <vector>

namespace rotary {

class staging_area {
  public:
    explicit staging_area(size_t bytes);
    ~staging_area();
    staging_area(const staging_area &)             = delete;
    staging_area & operator=(const staging_area &) = delete;

    bool   ok() const { return base_ != nullptr; }
    size_t size() const { return size_; }
    char * base() const { return base_; }
    char * take(size_t bytes); // NULL if there is no room
    void   give(char * block, size_t bytes) noexcept;

    static constexpr size_t unit = 4096;

  private:
    struct gap {
        size_t offset, size;
    };

    char *           base_ = nullptr;
    size_t           size_;
    size_t           n_taken_ = 0;
    std::vector<gap> free_; // by offset; with capacity for every give()
};

} // namespace rotary
