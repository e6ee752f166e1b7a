// SPDX-License-Identifier: MIT
//
// Pool lock. See pool_lock.hpp.

#include "pool/pool_lock.hpp"

#include <new>

namespace rotary {

pool_lock::pool_lock(bool serves_child, std::function<void()> orphan) :
    // No waiting: a graph may take long, and may itself wait for a lock of Python's that the forking thread holds.
    guard_([this] { locked_for_fork_ = !held_here() && mutex_.try_lock(); },
           [this, serves_child, orphan = std::move(orphan)](bool in_child) {
               if (in_child && (!locked_for_fork_ || !serves_child)) {
                   new (&mutex_) std::mutex; // the holder may be a thread of the parent
                   holder_   = std::thread::id();
                   orphaned_ = true;
                   orphan();
               } else if (locked_for_fork_) {
                   mutex_.unlock();
               }
           }) {}

} // namespace rotary
