// SPDX-License-Identifier: MIT
//
// Uring: an io_uring for reads, by system calls alone: a single ring needs no liburing.
// Threading: one user thread at a time.
// Source: io_uring_setup(2), io_uring_enter(2).

#pragma once

#include "store/reader.hpp"

#include <linux/io_uring.h>
#include <memory>
#include <string>
#include <vector>

namespace rotary {

class uring {
  public:
    static constexpr unsigned n_entries = 64;                 // reads that may be in flight

    static std::unique_ptr<uring> open(std::string & reason); // NULL with the reason if the kernel refuses

    ~uring(); // waits for reads in flight: the kernel must not write into freed memory
    uring(const uring &)             = delete;
    uring & operator=(const uring &) = delete;

    void   submit(const read_request & request);
    size_t in_flight() const { return in_flight_; }

    // As reader::complete(). Returns an errno if the kernel no longer serves the ring, whose use take_back() then ends.
    int complete(std::vector<read_result> & results, bool wait);

    // Wait for the reads that the kernel has accepted; return what is left to read of all others.
    std::vector<read_request> take_back(std::vector<read_result> & results, int error);

    // In a forked child: leave the ring to the parent. Nothing may be in flight.
    void abandon();

  private:
    struct slot {
        read_request request;
        size_t       done;      // bytes read so far; the kernel may read less than asked
        unsigned     cancelled; // how often the kernel has cancelled it
        uint32_t     turn;      // number of this use of the slot: completions of earlier uses are ignored
    };

    uring() = default;

    bool       set_up(std::string & reason);
    char *     map(size_t size, long what) const;
    unsigned * at(unsigned offset) const { return (unsigned *) (void *) (ring_ + offset); }

    void push(size_t index);
    long enter(unsigned n_wait);
    void reap(std::vector<read_result> & results);
    void release(size_t index);

    int                       fd_        = -1;
    char *                    ring_      = nullptr;
    io_uring_sqe *            sqes_      = nullptr;
    size_t                    ring_size_ = 0, sqes_size_ = 0;
    unsigned *                sq_head_;
    unsigned *                sq_tail_;
    unsigned *                sq_array_;
    unsigned *                cq_head_;
    unsigned *                cq_tail_;
    unsigned                  sq_mask_, cq_mask_;
    const io_uring_cqe *      cqes_;
    std::vector<slot>         slots_;
    std::vector<size_t>       free_;
    size_t                    in_flight_ = 0;
    bool                      ending_    = false;
    int                       refused_   = 0; // errno, once the kernel keeps cancelling a read
    std::vector<read_request> unread_;        // for take_back() to return
    std::vector<read_result>  dropped_;       // results that the destructor discards
};

} // namespace rotary
