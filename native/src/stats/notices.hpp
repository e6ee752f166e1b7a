// SPDX-License-Identifier: MIT
//
// Notices: fallbacks and choices that a user should know of. Each is logged once, as a warning, and kept for
// rotary_pool_notice().
// Threading: any thread; see statistics.hpp.

#pragma once

#include "base/fork.hpp"

#include <deque>
#include <string>

namespace rotary {

class notices {
  public:
    void         say(const std::string & text);
    int32_t      size() const;
    const char * text(int32_t index) const; // NULL past the end; valid while this object lives

  private:
    mutable fork_mutex      mutex_;
    std::deque<std::string> texts_; // a deque: the texts handed out must not move
};

} // namespace rotary
