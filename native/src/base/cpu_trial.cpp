// SPDX-License-Identifier: MIT
//
// Trial: does the llama.cpp in this process run on this processor? A forked child computes one small graph on ggml's
// CPU backend. No feature lists are compared, because compilers, kernels and ggml name processor features differently.
// Only a child that dies of an illegal instruction means no.
//
// Even listing ggml's devices runs code of the CPU backend, so the child does that too, never the parent.
//
// Threading: any thread. The child calls nothing but ggml and ends by _exit().

#include "base/cpu_trial.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cerrno>
#include <csignal>
#include <dlfcn.h>
#include <fcntl.h>
#include <initializer_list>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

namespace rotary {

// The CPU backend's device: that of a linked backend if there is one, because the registry would open the GPUs too.
static ggml_backend_dev_t cpu_device() {
    const auto         linked = (ggml_backend_reg_t (*)()) dlsym(RTLD_DEFAULT, "ggml_backend_cpu_reg");
    ggml_backend_reg_t reg    = linked != nullptr ? linked() : ggml_backend_reg_by_name("CPU");
    return reg != nullptr && ggml_backend_reg_dev_count(reg) > 0 ? ggml_backend_reg_dev_get(reg, 0) : nullptr;
}

// Kernels of the common types, for one token and for several, and the operations between them in a layer.
static void compute_a_little(ggml_backend_dev_t cpu) {
    static constexpr ggml_type types[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0,
                                           GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL };
    static constexpr int64_t   n_in = 256, n_out = 8, n_columns = 4;

    const ggml_backend_ptr backend(ggml_backend_dev_init(cpu, nullptr));
    const size_t           memory = 64 * ggml_tensor_overhead() + ggml_graph_overhead();
    const ggml_context_ptr context(ggml_init({ memory, nullptr, true }));
    ggml_context *         c     = context.get();
    ggml_cgraph *          graph = ggml_new_graph(c);
    for (const int64_t columns : { (int64_t) 1, n_columns }) {
        ggml_tensor * input = ggml_new_tensor_2d(c, GGML_TYPE_F32, n_in, columns);
        ggml_tensor * state = ggml_silu(c, ggml_rms_norm(c, input, 1e-6f));
        for (const ggml_type type : types) {
            ggml_build_forward_expand(graph, ggml_mul_mat(c, ggml_new_tensor_2d(c, type, n_in, n_out), state));
        }
        ggml_build_forward_expand(graph, ggml_soft_max(c, state));
    }
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(c, backend.get()));
    ggml_backend_buffer_clear(buffer.get(), 0);
    const auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(cpu), "ggml_backend_set_n_threads");
    if (set_n_threads != nullptr) {
        set_n_threads(backend.get(), 1); // a forked child has no other thread
    }
    ggml_backend_graph_compute(backend.get(), graph);
}

[[noreturn]] static void be_the_child() {
    // The application may have a handler for SIGILL that prints, and core dumps enabled.
    signal(SIGILL, SIG_DFL);
    const rlimit none = { 0, 0 };
    setrlimit(RLIMIT_CORE, &none);
    if (ggml_backend_dev_t cpu = cpu_device()) {
        compute_a_little(cpu);
    }
    _exit(0);
}

bool cpu_runs() {
    // The child's end of the pipe closes when the child ends. A child that hangs, on a lock that another thread held at
    // the fork, proves nothing.
    static constexpr int patience_ms = 30000;

    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return true;
    }
    const pid_t child = fork();
    if (child == 0) {
        be_the_child();
    }
    close(ends[1]);
    int status = 0;
    if (child > 0) {
        pollfd ended = { ends[0], POLLIN, 0 };
        int    n     = 0;
        do {
            n = poll(&ended, 1, patience_ms);
        } while (n < 0 && errno == EINTR);
        if (n <= 0) {
            kill(child, SIGKILL);
        }
        pid_t found = -1;
        do {
            found = waitpid(child, &status, 0);
        } while (found < 0 && errno == EINTR);
        status = found == child ? status : 0; // else the application has reaped the child, and its status is lost
    }
    close(ends[0]);
    return !WIFSIGNALED(status) || WTERMSIG(status) != SIGILL;
}

} // namespace rotary
