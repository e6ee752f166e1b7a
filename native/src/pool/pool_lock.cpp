// SPDX-License-Identifier: MIT
//
// Pool lock. See pool_lock.hpp.

#include "pool/pool_lock.hpp"

#include <new>

namespace rotary {

pool_lock::pool_lock(bool serves_child, std::function<void()> orphan) :
    // Not waited for: a graph may take long, and wait for a lock of Python's that the one who forks holds.
    guard_([this] { locked_for_fork_ = !held_here() && mutex_.try_lock(); },
           [this, serves_child, orphan = std::move(orphan)](bool in_child) {
               if (in_child && (!locked_for_fork_ || !serves_child)) {
                   new (&mutex_) std::mutex; // who held it may not be here
                   holder_   = std::thread::id();
                   orphaned_ = true;
                   orphan();
               } else if (locked_for_fork_) {
                   mutex_.unlock();
               }
           }) {}

} // namespace rotary
