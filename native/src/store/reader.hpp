// SPDX-License-Identifier: MIT
//
// Reader: reads from files into memory, many at a time, in the background. io_uring where the kernel lets us and as long
// as it does, else a few threads with pread, or fewer, or none. Knows nothing of experts.
// Threading: one user thread at a time; it calls submit() and complete(). Another may fork(): that waits until nothing is
// in flight, since a direct read must not go on while its memory is shared with a child (open(2)). The child begins anew.

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
    size_t   size;      // to ask for; a direct read's is rounded up and may go past the end of the file
    size_t   needed;    // of those, the bytes that must come
    size_t   alignment; // where a read that came short may go on
    uint64_t tag;       // the user's own

    // Bytes that are there after `n` more came at `done`: more than before, or the file ends here.
    size_t go_on_at(size_t done, size_t n) const {
        const size_t at = done + n;
        return at >= needed ? at : at / alignment * alignment;
    }

    // What remains of it.
    read_request rest(size_t done) const {
        return { fd, offset + done, memory + done, size - done, needed - done, alignment, tag };
    }
};

struct read_result {
    uint64_t tag;
    int      error; // 0, an errno, or ENODATA where the file ends early
};

class read_threads;
class uring;

class reader {
  public:
    reader();  // io_uring or threads, by what works here
    ~reader(); // waits for what is in flight: nobody must write into freed memory

    rotary_io kind() const { return kind_; }
    size_t    capacity() const;                 // reads that may be in flight

    static constexpr size_t max_in_flight = 64; // whatever the capacity is by now

    // Start a read; the caller keeps to the capacity.
    void submit(const read_request & request);

    // Take what has finished. With `wait`, and something in flight, at least one. Where memory runs out, nothing is lost:
    // what is not in `results` comes the next time.
    void complete(std::vector<read_result> & results, bool wait);

    // Wait until nothing is in flight, so that no memory is written any more. What has not begun yet is cancelled.
    void finish() noexcept;

    // Fallbacks since this was last asked, with their reasons.
    std::vector<std::string> take_notices();

  private:
    void open();
    void start_threads();
    void start(const read_request & request);
    void collect(std::vector<read_result> & results, bool wait);
    void resume();
    void finish_all() noexcept;

    std::mutex                    mutex_;          // between the user and a fork
    std::atomic<rotary_io>        kind_{ ROTARY_IO_THREADS };
    std::unique_ptr<uring>        uring_;          // one of the two; neither in a child that has not read yet
    std::unique_ptr<read_threads> threads_;
    std::vector<read_result>      finished_;       // before a fork, and not taken yet; with room for all, as the next
    std::vector<read_result>      some_;
    std::vector<read_request>     unread_;         // of a ring that has failed
    int                           ring_error_ = 0; // of one for which there are no threads yet
    std::vector<std::string>      notices_;
    fork_guard                    guard_;
};

} // namespace rotary
