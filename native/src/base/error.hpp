// SPDX-License-Identifier: MIT
//
// Errors: one line of text per thread for rotary_last_error(), the same line in ggml's log.
//
// base/ is what every room stands on and nothing of paging: errors (here), the clock, forks (fork.hpp, forked_compute.hpp),
// what the machine and its cgroups give this process (memory.hpp, cpus.hpp, cgroup.hpp, cpu_trial.hpp), and what an inner
// device answers (inner_device.hpp). Called by all rooms; it includes none of them.
// Threading: any thread.

#pragma once

#include "rotary.h"

#include <string>

namespace rotary {

// printf into a string.
__attribute__((format(printf, 1, 2))) std::string format(const char * fmt, ...);

// Remember `text` as this thread's last error, log it, and hand `status` back.
int32_t fail(rotary_status status, const std::string & text);

// Remember another thread's error as this thread's; that thread has logged it.
void set_error(rotary_status status, const std::string & text);

// Remember the exception that is being handled, at a place where none may pass, as this thread's error. Needs no memory.
int32_t fail_by_exception() noexcept; // call it in a handler

// Call `run` where no exception may pass: returns `otherwise`, with this thread's error, if one is thrown.
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
