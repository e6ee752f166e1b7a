// SPDX-License-Identifier: MIT
//
// Reader: reads from files into memory, many at a time, in the background: by io_uring as long as the kernel allows it,
// else by a few threads with pread; if no thread can be started, complete() reads. Knows nothing of experts.
// Threading: one user thread at a time calls submit() and complete(). Another may fork(), which waits until nothing is
// in flight: a direct read must not go on while its memory is shared with a child (open(2)). The child starts over.

#pragma once

#include "base/fork.hpp"
#include "rotary.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace rotary {

struct read_request {
    int      fd;
    uint64_t offset;
    char *   memory;
    size_t   size;      // bytes to request; rounded up for a direct read, so may go past the end of the file
    size_t   needed;    // bytes that must arrive, at most `size`
    size_t   alignment; // of the offsets at which a short read may be resumed
    uint64_t tag;       // chosen by the user

    // Bytes done once `n` more have arrived, rounded down to where a read can resume. No progress: the file ends here.
    size_t go_on_at(size_t done, size_t n) const {
        const size_t at = done + n;
        return at >= needed ? at : at / alignment * alignment;
    }

    // The request for the rest.
    read_request rest(size_t done) const {
        return { fd, offset + done, memory + done, size - done, needed - done, alignment, tag };
    }
};

struct read_result {
    uint64_t tag;
    int      error; // 0, an errno, or ENODATA if the file ends early
};

class read_threads;
class uring;

class reader {
  public:
    reader();  // by io_uring if it works here, else by threads
    ~reader(); // waits for reads in flight, which would write into freed memory

    rotary_io kind() const { return kind_; }
    size_t    capacity() const;                 // reads that may be in flight

    static constexpr size_t max_in_flight = 64; // limit of capacity(), which may change

    // Start a read. At most capacity() may be in flight.
    void submit(const read_request & request);

    // Append finished reads to `results`; with `wait`, at least one if any is in flight. If this throws because memory
    // ran out, no result is lost: the next call delivers the rest.
    void complete(std::vector<read_result> & results, bool wait);

    // Wait until no read writes to memory any more. What a failed ring left unread ends with ECANCELED.
    void finish() noexcept;

    // Fallbacks since the last call, with their reasons.
    std::vector<std::string> take_notices();

  private:
    void open();
    void start_threads();
    void start(const read_request & request);
    void collect(std::vector<read_result> & results, bool wait);
    void resume();
    void finish_all() noexcept;

    std::mutex                    mutex_;          // between the user thread and a fork
    std::atomic<rotary_io>        kind_{ ROTARY_IO_THREADS };
    std::unique_ptr<uring>        uring_;          // one of the two; neither in a forked child that has not read yet
    std::unique_ptr<read_threads> threads_;
    std::vector<read_result>      finished_;       // by finish() or before a fork, for complete(); room for all
    std::vector<read_result>      some_;           // scratch of finish_all(); room for all
    std::vector<read_request>     unread_;         // what a failed ring left unread
    int                           ring_error_ = 0; // errno of a failed ring that threads have not replaced yet
    std::vector<std::string>      notices_;
    fork_guard                    guard_;
};

} // namespace rotary
