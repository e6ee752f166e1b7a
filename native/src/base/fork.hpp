// SPDX-License-Identifier: MIT
//
// Fork: what a child of this process lacks. fork() copies memory and one thread: locks of other threads stay locked, and
// waiting for these threads never ends. Objects with threads, locks, or reads in flight are told before and after.
// Threading: before() and after() run in the thread that forks. vfork() and posix_spawn(), with which programs start
// other programs, call neither.

#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

namespace rotary {

// Number of forks between the first process and this one: differs between a child and its parent.
uint32_t fork_generation();

// Have `before` called before every fork() and `after` after it, in the parent and in the child. Make it the last member
// of a class, so that it exists only while the others do.
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

// A mutex that is held for moments only, and that is free in a forked child.
class fork_mutex : public std::mutex {
  public:
    fork_mutex();

  private:
    bool       held_ = false;
    fork_guard guard_;
};

} // namespace rotary
