// SPDX-License-Identifier: MIT
//
// Errors: one line of text per thread for rotary_last_error(), the same line in ggml's log.
//
// base/ is what every room builds on and knows nothing of paging: errors (here), the clock (clock.hpp), forks
// (fork.hpp, forked_compute.hpp), what the machine and its cgroups give this process (memory.hpp, cpus.hpp, cgroup.hpp,
// cpu_trial.hpp), and questions to an inner device (inner_device.hpp). Called by all rooms; it includes none of them.
// Threading: any thread.

#pragma once

#include "rotary.h"

#include <string>

namespace rotary {

// printf to a string.
__attribute__((format(printf, 1, 2))) std::string format(const char * fmt, ...);

// Store `text` as this thread's last error, log it, and return `status`.
int32_t fail(rotary_status status, const std::string & text);

// Store another thread's error, which that thread has logged, as this thread's.
void set_error(rotary_status status, const std::string & text);

// Store the exception being handled as this thread's error. Call it in a handler; it needs no memory.
int32_t fail_by_exception() noexcept;

// Call `run` where no exception may escape: if one is thrown, store it as this thread's error and return `otherwise`.
template <typename result, typename function> result guarded(result otherwise, const function & run) noexcept {
    try {
        return run();
    } catch (...) {
        fail_by_exception();
        return otherwise;
    }
}

rotary_status last_status();
const char *  last_error();
void          clear_error();

// Bytes as messages show them: "1234.5 MiB".
std::string mib(uint64_t bytes);

} // namespace rotary
