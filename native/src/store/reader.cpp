// SPDX-License-Identifier: MIT
//
// Reader. See reader.hpp; io_uring is uring.cpp.

#include "store/reader.hpp"

#include "base/error.hpp"
#include "store/uring.hpp"

#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <thread>
#include <unistd.h>
#include <utility>

namespace rotary {

// ---- threads

class read_threads {
  public:
    static constexpr size_t n_wanted   = 8;
    static constexpr size_t n_requests = n_wanted * 4; // that may be in flight

    // Starts as many threads as the system allows. Delegates to another constructor, so that the destructor joins them
    // if memory runs out here.
    explicit read_threads(std::string & reason) : read_threads() {
        try {
            while (threads_.size() < n_wanted) {
                threads_.emplace_back([this] { work(); });
            }
        } catch (const std::exception & refused) {
            reason = refused.what();
        }
    }

    ~read_threads() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread & each : threads_) {
            each.join();
        }
    }

    size_t size() const { return threads_.size(); }

    size_t in_flight() const { return in_flight_; }

    void submit(const read_request & request) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            results_.reserve(in_flight_ + 1); // a reading thread could not report that memory ran out
            queue_.push_back(request);
        }
        in_flight_++;
        wake_.notify_one();
    }

    void complete(std::vector<read_result> & results, bool wait) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (wait && threads_.empty() && !queue_.empty()) {
            const read_request request = queue_.front();
            queue_.pop_front();
            results_.push_back({ request.tag, read_all(request) });
        } else if (wait && in_flight_ > 0) {
            done_.wait(lock, [this] { return !results_.empty(); });
        }
        results.insert(results.end(), results_.begin(), results_.end());
        in_flight_ -= results_.size();
        results_.clear();
    }

  private:
    read_threads() { threads_.reserve(n_wanted); }

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
            done                = request.go_on_at(done, n);
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
    size_t                   in_flight_ = 0; // submitted and not yet delivered; the user thread's
    bool                     stop_      = false;
};

// ---- choice

reader::reader() :
    guard_(
        [this] {
            mutex_.lock();
            finish_all();
        },
        [this](bool in_child) {
            if (in_child) {
                if (uring_) {
                    uring_->abandon();
                }
                uring_.reset();
                (void) threads_.release(); // leaked: its threads do not exist here and cannot be joined
            }
            mutex_.unlock();
        }) {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_.reserve(max_in_flight);
    some_.reserve(max_in_flight);
    open();
}

reader::~reader() = default;

void reader::open() {
    const char * asked = getenv("ROTARY_IO");
    if (asked == nullptr || strcmp(asked, "threads") != 0) {
        std::string reason;
        uring_ = uring::open(reason);
        if (uring_) {
            kind_ = ROTARY_IO_URING;
            return;
        }
        notices_.push_back("io_uring cannot be used here, so reads go through threads: " + reason);
    }
    start_threads();
}

void reader::start_threads() {
    kind_ = ROTARY_IO_THREADS;
    std::string reason;
    threads_ = std::make_unique<read_threads>(reason);
    if (threads_->size() < read_threads::n_wanted) {
        notices_.push_back(format("only %zu of %zu threads that read could be started, so reads are slower: %s",
                                  threads_->size(), read_threads::n_wanted, reason.c_str()));
    }
}

std::vector<std::string> reader::take_notices() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(notices_, {});
}

// ---- reading

size_t reader::capacity() const {
    static_assert(uring::n_entries <= max_in_flight && read_threads::n_requests <= max_in_flight, "no more than that");
    return kind_ == ROTARY_IO_URING ? (size_t) uring::n_entries : read_threads::n_requests;
}

void reader::submit(const read_request & request) {
    const std::lock_guard<std::mutex> lock(mutex_);
    resume();
    start(request);
}

void reader::start(const read_request & request) {
    if (!uring_ && !threads_) {
        open();
    }
    if (uring_) {
        uring_->submit(request);
    } else {
        threads_->submit(request);
    }
}

void reader::complete(std::vector<read_result> & results, bool wait) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!finished_.empty()) {
        results.insert(results.end(), finished_.begin(), finished_.end());
        finished_.clear();
    }
    collect(results, wait && results.empty());
    resume();
    if (wait && results.empty()) { // the ring has failed, and threads read now
        collect(results, true);
    }
}

void reader::finish() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    finish_all();
    for (const read_request & each : unread_) {
        finished_.push_back({ each.tag, ECANCELED });
    }
    unread_.clear();
}

// Allocates nothing if `results` has room for all reads in flight: a thread that forks calls it.
void reader::collect(std::vector<read_result> & results, bool wait) {
    if (uring_) {
        const int error = uring_->complete(results, wait);
        if (error != 0) {
            unread_     = uring_->take_back(results, error);
            ring_error_ = error;
            uring_.reset();
        }
    } else if (threads_) {
        threads_->complete(results, wait);
    }
}

// Give threads what a failed ring left unread. If memory runs out, the next call goes on from there.
void reader::resume() {
    if (ring_error_ != 0) {
        notices_.push_back(format("io_uring does not work any more, so reads go through threads: io_uring_enter: %s",
                                  strerror(ring_error_)));
        start_threads();
        ring_error_ = 0;
    }
    for (; !unread_.empty(); unread_.pop_back()) {
        start(unread_.back());
    }
}

void reader::finish_all() noexcept {
    while ((uring_ && uring_->in_flight() > 0) || (threads_ && threads_->in_flight() > 0)) {
        some_.clear();
        collect(some_, true);
        finished_.insert(finished_.end(), some_.begin(), some_.end());
    }
}

} // namespace rotary
