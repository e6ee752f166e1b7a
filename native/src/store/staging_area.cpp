// SPDX-License-Identifier: MIT
//
// Staging area. See staging_area.hpp.

#include "store/staging_area.hpp"

#include <algorithm>
#include <sys/mman.h>

namespace rotary {

static size_t whole_units(size_t bytes) {
    return (bytes + staging_area::unit - 1) / staging_area::unit * staging_area::unit;
}

staging_area::staging_area(size_t bytes) : size_(whole_units(bytes)) {
    free_.reserve(2);
    void * memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) {
        base_ = (char *) memory;
        free_.push_back({ 0, size_ });
    }
}

staging_area::~staging_area() {
    if (base_ != nullptr) {
        munmap(base_, size_);
    }
}

char * staging_area::take(size_t bytes) {
    bytes = whole_units(bytes);
    for (auto it = free_.begin(); it != free_.end(); ++it) {
        if (it->size < bytes) {
            continue;
        }
        char * block = base_ + it->offset;
        if (free_.capacity() < n_taken_ + 2) { // there is at most one gap more than blocks: give() never allocates
            const size_t index = it - free_.begin();
            free_.reserve(2 * (n_taken_ + 2));
            it = free_.begin() + index;
        }
        n_taken_++;
        it->offset += bytes;
        it->size -= bytes;
        if (it->size == 0) {
            free_.erase(it);
        }
        return block;
    }
    return nullptr;
}

void staging_area::give(char * block, size_t bytes) noexcept {
    const gap  given{ (size_t) (block - base_), whole_units(bytes) };
    const auto next = std::lower_bound(free_.begin(), free_.end(), given,
                                       [](const gap & a, const gap & b) { return a.offset < b.offset; });
    const auto it   = free_.insert(next, given);
    n_taken_--;
    if (it + 1 != free_.end() && it->offset + it->size == (it + 1)->offset) {
        it->size += (it + 1)->size;
        free_.erase(it + 1);
    }
    if (it != free_.begin() && (it - 1)->offset + (it - 1)->size == it->offset) {
        (it - 1)->size += it->size;
        free_.erase(it);
    }
}

} // namespace rotary
