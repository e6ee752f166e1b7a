// SPDX-License-Identifier: MIT
//
// Errors. See error.hpp.

#include "error.hpp"

#include "ggml-impl.h"

#include <cstdarg>
#include <cstdio>

namespace rotary {

static thread_local rotary_status last_error_status = ROTARY_OK;
static thread_local std::string   last_error_text;

std::string format(const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    va_list again;
    va_copy(again, args);
    const int   n = vsnprintf(nullptr, 0, fmt, args);
    std::string out(n > 0 ? n : 0, '\0');
    vsnprintf(&out[0], out.size() + 1, fmt, again);
    va_end(again);
    va_end(args);
    return out;
}

// Names, environment values and words of users may have line breaks and escape sequences in them.
static std::string one_line(std::string text) {
    for (char & c : text) {
        c = (unsigned char) c < ' ' || c == 0x7f ? '?' : c;
    }
    return text;
}

int32_t fail(rotary_status status, const std::string & text) {
    last_error_status = status;
    last_error_text   = one_line(text);
    GGML_LOG_ERROR("rotary: %s\n", last_error_text.c_str());
    return status;
}

rotary_status last_status() {
    return last_error_status;
}

const char * last_error() {
    return last_error_text.c_str();
}

void clear_error() {
    last_error_status = ROTARY_OK;
    last_error_text.clear();
}

std::string mib(uint64_t bytes) {
    return format("%.1f MiB", bytes / 1048576.0);
}

} // namespace rotary
