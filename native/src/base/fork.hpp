// SPDX-License-Identifier: MIT
//
// Fork guards. fork() copies memory but only one thread: in the child, locks of other threads stay locked, and waiting
// for these threads never ends. Objects with threads, locks or reads in flight have a guard, called before and after.
// Threading: guards run in the forking thread. vfork() and posix_spawn(), which start other programs, call none.

#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

namespace rotary {

// Number of forks from the first process to this one; differs between a child and its parent.
uint32_t fork_generation();

// Calls `before` before every fork(), and `after` after it in the parent and in the child. Make it the last member of a
// class, so that it exists only while the other members do.
class fork_guard {
  public:
    fork_guard(std::function<void()> before, std::function<void(bool in_child)> after);
    ~fork_guard();
    fork_guard(const fork_guard &)             = delete;
    fork_guard & operator=(const fork_guard &) = delete;

  private:
    friend class fork_list;

    std::function<void()>     before_;
    std::function<void(bool)> after_;
};

// A mutex that is held only briefly, and that is free in a forked child.
class fork_mutex : public std::mutex {
  public:
    fork_mutex();

  private:
    bool       held_ = false;
    fork_guard guard_;
};

} // namespace rotary
