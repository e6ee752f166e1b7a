// SPDX-License-Identifier: MIT
//
// Errors. See error.hpp.

#include "base/error.hpp"

#include "ggml-impl.h"

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>

namespace rotary {

static thread_local rotary_status last_error_status = ROTARY_OK;
static thread_local std::string   last_error_text;
static thread_local const char *  last_error_static = nullptr; // replaces the text where memory is short

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

// Texts from users, such as names and environment values, may contain line breaks and escape sequences.
static std::string one_line(std::string text) {
    for (char & c : text) {
        c = (unsigned char) c < ' ' || c == 0x7f ? '?' : c;
    }
    return text;
}

void set_error(rotary_status status, const std::string & text) {
    last_error_status = status;
    last_error_text   = text;
    last_error_static = nullptr;
}

// Logs before storing the error: a log callback may call a function that fails and stores its own.
int32_t fail(rotary_status status, const std::string & text) {
    const std::string kept = one_line(text);
    GGML_LOG_ERROR("rotary: %s\n", kept.c_str());
    set_error(status, kept);
    return status;
}

int32_t fail_by_exception() noexcept {
    static const char * const no_memory =
        "memory: none is left for what is to be done; lower the budget or close other "
        "programs";
    try {
        throw;
    } catch (const std::bad_alloc &) {
        last_error_status = ROTARY_ERR_MEMORY;
        last_error_static = no_memory;
    } catch (const std::exception & error) {
        last_error_status = ROTARY_ERR_STATE;
        last_error_static = "libggml-rotary.so: stopped by an exception; the log says which; report it";
        try {
            GGML_LOG_ERROR("rotary: exception: %s\n", error.what());
        } catch (...) {
        }
    } catch (...) {
        last_error_status = ROTARY_ERR_STATE;
        last_error_static = "libggml-rotary.so: stopped by an unknown exception; none is expected; report it";
    }
    try {
        GGML_LOG_ERROR("rotary: %s\n", last_error_static);
    } catch (...) { // the error is stored already
    }
    return last_error_status;
}

rotary_status last_status() {
    return last_error_status;
}

const char * last_error() {
    return last_error_static != nullptr ? last_error_static : last_error_text.c_str();
}

void clear_error() {
    last_error_status = ROTARY_OK;
    last_error_text.clear();
    last_error_static = nullptr;
}

std::string mib(uint64_t bytes) {
    return format("%.1f MiB", bytes / 1048576.0);
}

} // namespace rotary
