// SPDX-License-Identifier: MIT
//
// LD_PRELOAD library that makes test-backend-ops page. That program allocates everything in the backend's default
// buffer, where no expert is paged. Here the expert matrices of MUL_MAT_ID go to the ROTARY_PAGED buffer type instead,
// as with llama.cpp's model loader; the original ggml_backend_alloc_ctx_tensors() allocates everything else.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef ggml_backend_buffer_t (*alloc_ctx_tensors_t)(struct ggml_context * ctx, ggml_backend_t backend);

// Freed at the next allocation, since the test does not know of it: by then the test has freed its own buffer. Tests
// run one at a time on a device.
static ggml_backend_buffer_t paged_buffer = NULL;

static ggml_backend_buffer_type_t paged_buft(ggml_backend_dev_t dev) {
    ggml_backend_dev_get_extra_bufts_t get_extra_bufts =
        (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev),
                                                                               "ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t * buft = get_extra_bufts ? get_extra_bufts(dev) : NULL;
    for (; buft != NULL && *buft != NULL; buft++) {
        if (strncmp(ggml_backend_buft_name(*buft), "ROTARY_PAGED", strlen("ROTARY_PAGED")) == 0) {
            return *buft;
        }
    }
    fprintf(stderr, "preload_paged: %s has no ROTARY_PAGED buffer type\n", ggml_backend_dev_name(dev));
    exit(2);
}

// The expert matrix of `node` that is to be paged, or NULL. A single expert, or experts of one row, are not paged.
static struct ggml_tensor * expert_matrix(const struct ggml_tensor * node) {
    struct ggml_tensor * weight = node->op == GGML_OP_MUL_MAT_ID ? node->src[0] : NULL;
    if (weight == NULL || weight->view_src != NULL || weight->data != NULL) {
        return NULL;
    }
    return weight->ne[1] > 1 && weight->ne[2] > 1 ? weight : NULL;
}

// One pass to add up the sizes (alloc == NULL), one to place the tensors.
static size_t place(struct ggml_context * ctx, ggml_backend_buffer_type_t buft, struct ggml_tallocr * alloc) {
    const size_t alignment = ggml_backend_buft_get_alignment(buft);
    size_t       size      = 0;
    for (struct ggml_tensor * node = ggml_get_first_tensor(ctx); node; node = ggml_get_next_tensor(ctx, node)) {
        struct ggml_tensor * weight = expert_matrix(node);
        if (weight == NULL) {
            continue;
        }
        size += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, weight), alignment);
        if (alloc != NULL && ggml_tallocr_alloc(alloc, weight) != GGML_STATUS_SUCCESS) {
            fprintf(stderr, "preload_paged: cannot place %s\n", weight->name);
            exit(2);
        }
    }
    return size;
}

ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors(struct ggml_context * ctx, ggml_backend_t backend) {
    alloc_ctx_tensors_t next = (alloc_ctx_tensors_t) dlsym(RTLD_NEXT, "ggml_backend_alloc_ctx_tensors");
    ggml_backend_dev_t  dev  = ggml_backend_get_device(backend);
    if (dev == NULL || strncmp(ggml_backend_dev_name(dev), "ROTARY", strlen("ROTARY")) != 0) {
        return next(ctx, backend);
    }
    ggml_backend_buffer_free(paged_buffer);
    paged_buffer = NULL;

    ggml_backend_buffer_type_t buft = paged_buft(dev);
    const size_t               size = place(ctx, buft, NULL);
    if (size > 0) {
        paged_buffer = ggml_backend_buft_alloc_buffer(buft, size);
        if (paged_buffer == NULL) {
            fprintf(stderr, "preload_paged: cannot allocate %zu bytes\n", size);
            exit(2);
        }
        ggml_backend_buffer_set_usage(paged_buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        struct ggml_tallocr alloc = ggml_tallocr_new(paged_buffer);
        place(ctx, buft, &alloc);
    }
    return next(ctx, backend);
}
