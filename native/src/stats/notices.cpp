// SPDX-License-Identifier: MIT
//
// Notices. See notices.hpp.

#include "stats/notices.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

void notices::say(const std::string & text) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (std::find(texts_.begin(), texts_.end(), text) != texts_.end()) {
            return;
        }
        texts_.push_back(text);
    }
    GGML_LOG_WARN("rotary: %s\n", text.c_str()); // unlocked: a log callback may ask for the figures
}

int32_t notices::size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return (int32_t) texts_.size();
}

const char * notices::text(int32_t index) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return index >= 0 && index < (int32_t) texts_.size() ? texts_[index].c_str() : nullptr;
}

} // namespace rotary
