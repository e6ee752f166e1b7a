// SPDX-License-Identifier: MIT
//
// Reader: reads from files into memory, many at a time, in the background. io_uring where the kernel lets us, else a few
// threads with pread. Knows nothing of experts.
// Threading: one user thread at a time; it calls submit() and complete().

#pragma once

#include "rotary.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace rotary {

struct read_request {
    int      fd;
    uint64_t offset;
    char *   memory;
    size_t   size;      // to ask for; a direct read's is rounded up and may go past the end of the file
    size_t   needed;    // of those, the bytes that must come
    size_t   alignment; // where a read that came short may go on
    uint64_t tag;       // the user's own
};

struct read_result {
    uint64_t tag;
    int      error; // 0, an errno, or ENODATA where the file ends early
};

class reader {
  public:
    virtual ~reader() = default; // waits for what is in flight: the kernel must not write into freed memory

    virtual rotary_io kind() const     = 0;
    virtual size_t    capacity() const = 0; // reads that may be in flight

    // Start a read; the caller keeps to the capacity.
    virtual void submit(const read_request & request) = 0;

    // Take what has finished. With `wait`, and something in flight, at least one.
    virtual void complete(std::vector<read_result> & results, bool wait) = 0;
};

// Whether ROTARY_IO=threads in the environment asks for threads where io_uring would do.
bool threads_asked_for();

// io_uring or threads, by what works here.
std::unique_ptr<reader> reader_new();

} // namespace rotary
