// SPDX-License-Identifier: MIT
//
// Pool lock: held by whoever runs a graph over a pool or changes its layers or slots. A graph may take long, so fork()
// does not wait for the lock: a child forked during a graph gets a pool that it cannot use.
// Threading: any thread.

#pragma once

#include "base/fork.hpp"

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

namespace rotary {

class pool_lock {
  public:
    // `serves_child`: a child can use the pool if the lock was free at the fork; in one that cannot, `orphan` is
    // called.
    pool_lock(bool serves_child, std::function<void()> orphan);

    class hold {
      public:
        explicit hold(pool_lock & lock) : lock_(lock), guard_(lock.mutex_) {
            lock_.holder_ = std::this_thread::get_id();
        }
        ~hold() { lock_.holder_ = std::thread::id(); }

      private:
        pool_lock &                       lock_;
        const std::lock_guard<std::mutex> guard_;
    };

    // Whether this thread holds the lock, as in a policy, predictor or log callback, which must not take it again.
    bool held_here() const { return holder_ == std::this_thread::get_id(); }

    bool is_orphaned() const { return orphaned_; } // in a child that cannot use the pool

  private:
    std::mutex                   mutex_;
    std::atomic<std::thread::id> holder_{};
    bool                         locked_for_fork_ = false;
    bool                         orphaned_        = false;
    fork_guard                   guard_; // last: see fork_guard
};

} // namespace rotary
