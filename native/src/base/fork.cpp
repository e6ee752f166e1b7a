// SPDX-License-Identifier: MIT
//
// Fork. See fork.hpp.

#include "base/fork.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <pthread.h>
#include <thread>
#include <vector>

namespace rotary {

static std::atomic<uint32_t> generation{ 0 };

uint32_t fork_generation() {
    return generation.load(std::memory_order_relaxed);
}

// ---- guards

class fork_list {
  public:
    static fork_list & get() {
        static auto & list = *new fork_list; // never destroyed: models may outlive our statics
        return list;
    }

    void add(fork_guard * guard) {
        const std::lock_guard<std::mutex> lock(mutex_);
        guards_.push_back(guard);
    }

    void remove(fork_guard * guard) {
        const std::lock_guard<std::mutex> lock(mutex_);
        guards_.erase(std::find(guards_.begin(), guards_.end(), guard));
    }

  private:
    fork_list() {
        pthread_atfork([] { get().before(); }, [] { get().after(false); }, [] { get().after(true); });
    }

    void before() {
        mutex_.lock();
        for (const fork_guard * each : guards_) {
            each->before_();
        }
    }

    void after(bool in_child) {
        if (in_child) {
            generation++;
        }
        for (auto each = guards_.rbegin(); each != guards_.rend(); ++each) {
            (*each)->after_(in_child);
        }
        mutex_.unlock();
    }

    std::mutex                mutex_;
    std::vector<fork_guard *> guards_;
};

fork_guard::fork_guard(std::function<void()> before, std::function<void(bool)> after) :
    before_(std::move(before)), after_(std::move(after)) {
    fork_list::get().add(this);
}

fork_guard::~fork_guard() {
    fork_list::get().remove(this);
}

// Gives up after 100 ms, because the holder may wait for another mutex that this fork already holds.
static bool lock_soon(std::mutex & mutex) {
    for (int ms = 0; ms < 100; ms++) {
        if (mutex.try_lock()) {
            return true;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
}

fork_mutex::fork_mutex() :
    guard_([this] { held_ = lock_soon(*this); },
           [this](bool in_child) {
               if (held_) {
                   unlock();
               } else if (in_child) {
                   new (static_cast<std::mutex *>(this)) std::mutex; // the holder is a thread of the parent
               }
           }) {}

} // namespace rotary
