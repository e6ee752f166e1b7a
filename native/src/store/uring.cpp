// SPDX-License-Identifier: MIT
//
// Uring. See uring.hpp.

#include "store/uring.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>

#ifndef IORING_FEAT_RW_CUR_POS
#define IORING_FEAT_RW_CUR_POS (1U << 3)
#endif

namespace rotary {

static void nap() {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// ---- opening

std::unique_ptr<uring> uring::open(std::string & reason) {
    std::unique_ptr<uring> self(new uring);
    return self->set_up(reason) ? std::move(self) : nullptr;
}

bool uring::set_up(std::string & reason) {
    const auto refused = [&](const char * call) {
        reason = format("%s: %s", call, strerror(errno));
        return false;
    };
    io_uring_params params = {};
    fd_                    = (int) syscall(__NR_io_uring_setup, n_entries, &params);
    if (fd_ < 0) {
        return refused("io_uring_setup");
    }
    // IORING_OP_READ has no feature flag of its own; RW_CUR_POS came with the same kernel.
    if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0 || (params.features & IORING_FEAT_RW_CUR_POS) == 0) {
        reason = "this kernel's has no plain reads, which came with Linux 5.6";
        return false;
    }
    ring_size_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                  params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sqes_size_ = params.sq_entries * sizeof(io_uring_sqe);
    ring_      = map(ring_size_, IORING_OFF_SQ_RING);
    if (ring_ == nullptr) {
        return refused("mmap of its ring");
    }
    sqes_ = (io_uring_sqe *) (void *) map(sqes_size_, IORING_OFF_SQES);
    if (sqes_ == nullptr) {
        return refused("mmap of its ring");
    }
    sq_head_  = at(params.sq_off.head);
    sq_tail_  = at(params.sq_off.tail);
    sq_mask_  = *at(params.sq_off.ring_mask);
    sq_array_ = at(params.sq_off.array);
    cq_head_  = at(params.cq_off.head);
    cq_tail_  = at(params.cq_off.tail);
    cq_mask_  = *at(params.cq_off.ring_mask);
    cqes_     = (const io_uring_cqe *) (const void *) (ring_ + params.cq_off.cqes);
    slots_.resize(n_entries);
    free_.reserve(n_entries);   // if memory runs out later, no completion may be lost
    unread_.reserve(n_entries); // and the destructor must not fail
    dropped_.reserve(n_entries);
    for (unsigned i = 0; i < n_entries; i++) {
        free_.push_back(i);
    }
    return enter(0) == 0 || refused("io_uring_enter"); // a sandbox may allow one call and not the other
}

char * uring::map(size_t size, long what) const {
    void * memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, what);
    return memory == MAP_FAILED ? nullptr : (char *) memory;
}

uring::~uring() {
    int error = 0;
    while (in_flight_ > 0 && error == 0) {
        dropped_.clear();
        error = complete(dropped_, true);
    }
    dropped_.clear();
    take_back(dropped_, error);
    abandon();
}

void uring::abandon() {
    if (sqes_ != nullptr) {
        munmap(sqes_, sqes_size_);
    }
    if (ring_ != nullptr) {
        munmap(ring_, ring_size_);
    }
    if (fd_ >= 0) {
        close(fd_);
    }
    fd_   = -1;
    ring_ = nullptr;
    sqes_ = nullptr;
}

// ---- reading

void uring::submit(const read_request & request) {
    const size_t index = free_.back();
    free_.pop_back();
    slots_[index].request   = request;
    slots_[index].done      = 0;
    slots_[index].cancelled = 0;
    in_flight_++;
    push(index);
}

void uring::push(size_t index) {
    const slot &   entry = slots_[index];
    const unsigned tail  = *sq_tail_;
    io_uring_sqe & sqe   = sqes_[tail & sq_mask_];
    memset(&sqe, 0, sizeof(sqe));
    sqe.opcode                 = IORING_OP_READ;
    sqe.fd                     = entry.request.fd;
    sqe.off                    = entry.request.offset + entry.done;
    sqe.addr                   = (uint64_t) (entry.request.memory + entry.done);
    sqe.len                    = (unsigned) (entry.request.size - entry.done);
    sqe.user_data              = (uint64_t) entry.turn << 32 | index;
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    enter(0); // the next call submits what the kernel does not take now
}

// Submit what is in the ring and wait for `n_wait` completions.
long uring::enter(unsigned n_wait) {
    const unsigned n_new = *sq_tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
    return syscall(__NR_io_uring_enter, fd_, n_new, n_wait, n_wait > 0 ? IORING_ENTER_GETEVENTS : 0, nullptr, 0);
}

int uring::complete(std::vector<read_result> & results, bool wait) {
    static constexpr int max_naps = 1000; // one second, while the kernel is short of memory

    reap(results);
    for (int naps = 0; wait && results.empty() && in_flight_ > 0 && refused_ == 0; reap(results)) {
        if (enter(1) >= 0 || errno == EINTR) { // a signal interrupts the wait, not the reads
            continue;
        }
        const int error = errno;
        if ((error != EAGAIN && error != EBUSY && error != ENOMEM) || ++naps > max_naps) {
            return error;
        }
        nap();
    }
    return refused_;
}

// When a thread exits, the kernel cancels the reads that it submitted; these are submitted again. A kernel that cannot
// start worker threads would cancel them for ever, hence max_cancelled.
void uring::reap(std::vector<read_result> & results) {
    static constexpr unsigned max_cancelled = 8;

    results.reserve(results.size() + in_flight_); // may throw, so before any completion leaves the ring
    unsigned head = *cq_head_;
    while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
        const io_uring_cqe cqe = cqes_[head & cq_mask_];
        __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
        const auto index = (uint32_t) cqe.user_data;
        if (index >= slots_.size() || slots_[index].turn != cqe.user_data >> 32) {
            continue;
        }
        slot &       entry = slots_[index];
        const bool   again = cqe.res == -EINTR || cqe.res == -EAGAIN || cqe.res == -ECANCELED;
        const size_t done  = cqe.res > 0 ? entry.request.go_on_at(entry.done, cqe.res) : entry.done;
        if (again || (done > entry.done && done < entry.request.needed)) { // a short read: ask for the rest
            entry.done = done;
            if (cqe.res == -ECANCELED && ++entry.cancelled > max_cancelled) {
                refused_ = ECANCELED;
            }
            if (!ending_ && refused_ == 0) {
                push(index);
                continue;
            }
            unread_.push_back(entry.request.rest(entry.done));
        } else {
            const int error = cqe.res < 0 ? -cqe.res : done >= entry.request.needed ? 0 : ENODATA;
            results.push_back({ entry.request.tag, error });
        }
        release(index);
    }
}

void uring::release(size_t index) {
    slots_[index].turn++;
    free_.push_back(index);
    in_flight_--;
}

// ---- ending

std::vector<read_request> uring::take_back(std::vector<read_result> & results, int error) {
    ending_ = true;
    if (error == EBADF || error == EOPNOTSUPP) {
        fd_ = -1; // somebody has closed it, and the number may be another file's by now
    }
    if (in_flight_ > 0) {
        const unsigned head = __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
        for (unsigned tail = *sq_tail_; tail != head; tail--) {
            const auto index = (uint32_t) sqes_[(tail - 1) & sq_mask_].user_data;
            unread_.push_back(slots_[index].request.rest(slots_[index].done));
            release(index);
        }
        __atomic_store_n(sq_tail_, head, __ATOMIC_RELEASE);
    }
    // The kernel still writes to the memory of the reads it has accepted; it posts their completions without a call.
    while (in_flight_ > 0) {
        reap(results);
        if (in_flight_ > 0) {
            nap();
        }
    }
    return std::move(unread_);
}

} // namespace rotary
