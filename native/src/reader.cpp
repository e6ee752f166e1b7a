// SPDX-License-Identifier: MIT
//
// Reader. See reader.hpp. io_uring is used through its system calls: all that is needed of it is one ring of reads.
// Source: io_uring_setup(2), io_uring_enter(2).

#include "reader.hpp"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <linux/io_uring.h>
#include <mutex>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>

namespace rotary {

// Bytes of a request that are there after `n` more came at `done`: more than before, or the file ends here.
static size_t go_on_at(const read_request & request, size_t done, size_t n) {
    const size_t at = done + n;
    return at >= request.needed ? at : at / request.alignment * request.alignment;
}

// ---- io_uring

class uring_reader : public reader {
  public:
    static std::unique_ptr<reader> make() {
        std::unique_ptr<uring_reader> self(new uring_reader);
        return self->open() ? std::move(self) : nullptr;
    }

    ~uring_reader() override {
        std::vector<read_result> dropped;
        while (in_flight_ > 0) {
            complete(dropped, true);
        }
        if (sqes_ != nullptr) {
            munmap(sqes_, sqes_size_);
        }
        if (ring_ != nullptr) {
            munmap(ring_, ring_size_);
        }
        if (fd_ >= 0) {
            close(fd_);
        }
    }

    rotary_io kind() const override { return ROTARY_IO_URING; }

    size_t capacity() const override { return n_entries; }

    void submit(const read_request & request) override {
        const size_t at = free_.back();
        free_.pop_back();
        slots_[at] = { request, 0, true };
        in_flight_++;
        push(at);
    }

    void complete(std::vector<read_result> & results, bool wait) override {
        reap(results);
        while (wait && results.empty() && in_flight_ > 0) {
            // A signal interrupts the wait, not the reads.
            if (enter(1) < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) {
                const int error = errno;
                for (size_t i = 0; i < slots_.size(); i++) {
                    if (slots_[i].busy) {
                        finish(i, error, results);
                    }
                }
                return;
            }
            reap(results);
        }
    }

  private:
    static constexpr unsigned n_entries = 64;

    struct slot {
        read_request request;
        size_t       done; // bytes that have come; a read may come in pieces
        bool         busy;
    };

    bool open() {
        io_uring_params params = {};
        fd_                    = (int) syscall(__NR_io_uring_setup, n_entries, &params);
        if (fd_ < 0 || (params.features & IORING_FEAT_SINGLE_MMAP) == 0) {
            return false;
        }
        ring_size_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                      params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
        sqes_size_ = params.sq_entries * sizeof(io_uring_sqe);
        ring_      = map(ring_size_, IORING_OFF_SQ_RING);
        sqes_      = (io_uring_sqe *) map(sqes_size_, IORING_OFF_SQES);
        if (ring_ == nullptr || sqes_ == nullptr) {
            return false;
        }
        sq_head_  = at(params.sq_off.head);
        sq_tail_  = at(params.sq_off.tail);
        sq_mask_  = *at(params.sq_off.ring_mask);
        sq_array_ = at(params.sq_off.array);
        cq_head_  = at(params.cq_off.head);
        cq_tail_  = at(params.cq_off.tail);
        cq_mask_  = *at(params.cq_off.ring_mask);
        cqes_     = (const io_uring_cqe *) (ring_ + params.cq_off.cqes);
        slots_.resize(n_entries);
        for (unsigned i = 0; i < n_entries; i++) {
            free_.push_back(i);
        }
        return true;
    }

    char * map(size_t size, off_t what) const {
        void * memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, what);
        return memory == MAP_FAILED ? nullptr : (char *) memory;
    }

    unsigned * at(unsigned offset) const { return (unsigned *) (void *) (ring_ + offset); }

    void push(size_t index) {
        const slot &   its  = slots_[index];
        const unsigned tail = *sq_tail_;
        io_uring_sqe & sqe  = sqes_[tail & sq_mask_];
        memset(&sqe, 0, sizeof(sqe));
        sqe.opcode                 = IORING_OP_READ;
        sqe.fd                     = its.request.fd;
        sqe.off                    = its.request.offset + its.done;
        sqe.addr                   = (uint64_t) (its.request.memory + its.done);
        sqe.len                    = (unsigned) (its.request.size - its.done);
        sqe.user_data              = index;
        sq_array_[tail & sq_mask_] = tail & sq_mask_;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
        enter(0); // what it did not take now, the next call will
    }

    // Hand over what is in the ring and wait for `n_wait` completions.
    long enter(unsigned n_wait) {
        const unsigned n_new = *sq_tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
        return syscall(__NR_io_uring_enter, fd_, n_new, n_wait, n_wait > 0 ? IORING_ENTER_GETEVENTS : 0, nullptr, 0);
    }

    void finish(size_t index, int error, std::vector<read_result> & results) {
        results.push_back({ slots_[index].request.tag, error });
        slots_[index].busy = false;
        free_.push_back(index);
        in_flight_--;
    }

    void reap(std::vector<read_result> & results) {
        unsigned head = *cq_head_;
        while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
            const io_uring_cqe cqe = cqes_[head & cq_mask_];
            __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
            slot &       its   = slots_[cqe.user_data];
            const bool   again = cqe.res == -EINTR || cqe.res == -EAGAIN;
            const size_t done  = cqe.res > 0 ? go_on_at(its.request, its.done, cqe.res) : its.done;
            if (again || (done > its.done && done < its.request.needed)) { // a short read: ask for the rest
                its.done = done;
                push(cqe.user_data);
            } else {
                finish(cqe.user_data, cqe.res < 0 ? -cqe.res : done >= its.request.needed ? 0 : ENODATA, results);
            }
        }
    }

    int                  fd_        = -1;
    char *               ring_      = nullptr;
    io_uring_sqe *       sqes_      = nullptr;
    size_t               ring_size_ = 0, sqes_size_ = 0;
    unsigned *           sq_head_;
    unsigned *           sq_tail_;
    unsigned *           sq_array_;
    unsigned *           cq_head_;
    unsigned *           cq_tail_;
    unsigned             sq_mask_, cq_mask_;
    const io_uring_cqe * cqes_;
    std::vector<slot>    slots_;
    std::vector<size_t>  free_;
    size_t               in_flight_ = 0;
};

// ---- threads

class thread_reader : public reader {
  public:
    thread_reader() {
        for (size_t i = 0; i < n_threads; i++) {
            threads_.emplace_back([this] { work(); });
        }
    }

    ~thread_reader() override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread & each : threads_) {
            each.join();
        }
    }

    rotary_io kind() const override { return ROTARY_IO_THREADS; }

    size_t capacity() const override { return n_threads * 4; }

    void submit(const read_request & request) override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            queue_.push_back(request);
            in_flight_++;
        }
        wake_.notify_one();
    }

    void complete(std::vector<read_result> & results, bool wait) override {
        std::unique_lock<std::mutex> lock(mutex_);
        if (wait) {
            done_.wait(lock, [this] { return !results_.empty() || in_flight_ == 0; });
        }
        in_flight_ -= results_.size();
        results.insert(results.end(), results_.begin(), results_.end());
        results_.clear();
    }

  private:
    static constexpr size_t n_threads = 8;

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
            if (stop_) {
                return;
            }
            const read_request request = queue_.front();
            queue_.pop_front();
            lock.unlock();
            const int error = read_all(request);
            lock.lock();
            results_.push_back({ request.tag, error });
            done_.notify_one();
        }
    }

    static int read_all(const read_request & request) {
        size_t done = 0;
        while (done < request.needed) {
            const ssize_t n = pread(request.fd, request.memory + done, request.size - done, request.offset + done);
            if (n < 0 && errno == EINTR) {
                continue;
            }
            if (n < 0) {
                return errno;
            }
            const size_t before = done;
            done                = go_on_at(request, done, n);
            if (done <= before) {
                return ENODATA;
            }
        }
        return 0;
    }

    std::mutex               mutex_;
    std::condition_variable  wake_, done_;
    std::deque<read_request> queue_;
    std::vector<read_result> results_;
    std::vector<std::thread> threads_;
    size_t                   in_flight_ = 0; // submitted and not yet handed over
    bool                     stop_      = false;
};

// ---- choice

bool threads_asked_for() {
    const char * wanted = getenv("ROTARY_IO");
    return wanted != nullptr && strcmp(wanted, "threads") == 0;
}

std::unique_ptr<reader> reader_new() {
    std::unique_ptr<reader> uring = threads_asked_for() ? nullptr : uring_reader::make();
    return uring ? std::move(uring) : std::make_unique<thread_reader>();
}

} // namespace rotary
