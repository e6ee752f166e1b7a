// SPDX-License-Identifier: MIT
//
// Staging ring. See staging_ring.hpp.

#include "link/staging_ring.hpp"

#include "base/cpus.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <cstring>
#include <exception>

namespace rotary {

// The ring is constructed before its first thread starts, so that the destructor joins its threads if memory runs out.
std::unique_ptr<staging_ring> staging_ring::open(std::shared_ptr<link> over, ggml_backend_dev_t inner,
                                                 std::string & reason) {
    std::unique_ptr<staging_ring> self(new staging_ring(std::move(over)));
    return self->set_up(inner, reason) ? std::move(self) : nullptr;
}

bool staging_ring::set_up(ggml_backend_dev_t inner, std::string & reason) {
    failure_.reserve(512); // a copying thread could not report that memory ran out
    memory_ = link_->new_pinned(block_bytes * n_blocks, reason);
    if (!memory_.memory) {
        reason = "no memory can be page-locked, " + reason;
        return false;
    }
    reason.clear();
    for (size_t i = 0; i < n_blocks; i++) {
        blocks_.push_back(
            { (char *) memory_.memory.get() + i * block_bytes, ggml_backend_event_ptr(ggml_backend_event_new(inner)) });
        free_.push_back(i);
        if (!blocks_.back().copied) {
            reason = "no events for the memory that experts pass through";
            return false;
        }
    }
    // Several, so that page faults overlap and one core's copying is no limit, but few enough to spare the machine.
    const size_t n_threads = std::clamp<size_t>(cpu_count() / 2, 1, 4);
    threads_.reserve(n_threads);
    try {
        while (threads_.size() < n_threads) {
            threads_.emplace_back([this] { work(); });
        }
    } catch (const std::exception & refused) {
        reason = format("only %zu of %zu threads that copy could be started: %s", threads_.size(), n_threads,
                        refused.what());
    }
    return !threads_.empty();
}

staging_ring::~staging_ring() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    changed_.notify_all();
    for (std::thread & each : threads_) {
        each.join();
    }
    link_->synchronize(); // it may still copy out of the blocks
}

bool staging_ring::copy(const std::vector<piece> & pieces) {
    std::unique_lock<std::mutex> lock(mutex_);
    pieces_ = pieces;
    next_   = 0;
    left_   = pieces.size();
    failure_.clear();
    changed_.notify_all();
    changed_.wait(lock, [&] { return left_ == 0; });
    if (!failure_.empty()) {
        fail(ROTARY_ERR_DEVICE, failure_);
    }
    return failure_.empty();
}

void staging_ring::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        changed_.wait(lock, [&] { return ending_ || (next_ < pieces_.size() && !free_.empty()); });
        if (ending_) {
            return;
        }
        const piece  next  = pieces_[next_++];
        const size_t index = free_.front();
        free_.erase(free_.begin());
        lock.unlock();
        block & through = blocks_[index];
        if (through.used) {
            ggml_backend_event_synchronize(through.copied.get());
        }
        memcpy(through.memory, next.from, next.bytes);
        const bool done = link_->copy(next.to, through.memory, next.bytes) && link_->record(through.copied.get());
        lock.lock();
        through.used = true;
        if (!done && failure_.empty()) {
            failure_.assign(last_error(),
                            strnlen(last_error(), failure_.capacity())); // this thread's error, which copy() passes on
        }
        free_.push_back(index);
        left_--;
        changed_.notify_all();
    }
}

} // namespace rotary
