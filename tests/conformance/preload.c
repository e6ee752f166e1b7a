// SPDX-License-Identifier: MIT
//
// LD_PRELOAD library for test-llama-archs. It does three things:
//
// At start it loads the backend named by GGML_BACKEND_PATH, since that program does not call ggml_backend_load_all().
// (Do not use it with a program that does: the devices would be registered twice.)
//
// It gives the test's models N_EXPERT experts instead of two. Upstream's models use two of two, so every token needs
// both and none can be paged. The models that the test compares with, and those it reads back from a file, get as many.
//
// At exit it flushes llama.cpp's log: the thread that writes it is not joined, so the table's last rows could be lost
// (llama.cpp issue 22142).
#include "ggml-backend.h"
#include "gguf.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_EXPERT_UPSTREAM = 2, N_EXPERT = 8 };

__attribute__((constructor)) static void preload(void) {
    const char * path = getenv("GGML_BACKEND_PATH");
    if (path == NULL) {
        return;
    }
    if (ggml_backend_load(path) == NULL) {
        fprintf(stderr, "preload: cannot load GGML_BACKEND_PATH=%s\n", path);
        exit(2);
    }
}

__attribute__((destructor)) static void flush_log(void) {
    void * (*common_log_main)(void);
    void (*common_log_flush)(void *);
    *(void **) &common_log_main  = dlsym(RTLD_DEFAULT, "_Z15common_log_mainv");
    *(void **) &common_log_flush = dlsym(RTLD_DEFAULT, "_Z16common_log_flushP10common_log");
    if (common_log_main != NULL && common_log_flush != NULL) {
        common_log_flush(common_log_main());
    }
}

void gguf_set_val_u32(struct gguf_context * ctx, const char * key, uint32_t val) {
    void (*next)(struct gguf_context *, const char *, uint32_t);
    *(void **) &next = dlsym(RTLD_NEXT, "gguf_set_val_u32");

    const char * suffix = strrchr(key, '.');
    if (suffix != NULL && strcmp(suffix, ".expert_count") == 0 && val == N_EXPERT_UPSTREAM) {
        val = N_EXPERT;
    }
    next(ctx, key, val);
}
