// SPDX-License-Identifier: MIT
//
// Link: a library that moves experts to a device beside its computation. libggml-rotary.so opens it if its inner device
// is of that kind; cuda_link.cu is the one for CUDA. The interface is C function pointers, so that each builds without
// the other.
//
// A link has one stream for lookups and copies. That stream and the inner backend's wait for each other through events
// of the inner device (ggml's event->context: a cudaEvent_t), never through the host. A second stream copies
// prefetches, until the lookup that they are for. Functions that return bool enqueue, unless they say that they wait;
// after false, error() has the text.

#pragma once

#include "cache/page_table.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ROTARY_LINK_ABI 2
#define ROTARY_LINK_MAX_TENSORS 4

typedef struct rotary_link rotary_link;

enum rotary_pin { // how host memory is pinned in place
    ROTARY_PIN_READ_ONLY,
    ROTARY_PIN_DEFAULT,
};

// Where one tensor of a layer comes from and goes to. `store` is an address that the device can read.
typedef struct rotary_link_tensor {
    const void * store;       // expert 0
    void *       slots;       // slot 0
    uint64_t     store_bytes; // of one expert; experts follow each other without gaps
    uint64_t     slot_bytes;  // from one slot to the next
} rotary_link_tensor;

typedef struct rotary_link_layer {
    rotary_page_table  table; // in device memory
    int32_t            n_tensors;
    rotary_link_tensor tensors[ROTARY_LINK_MAX_TENSORS];
} rotary_link_layer;

// A lookup, resolved on the device: ids -> slot ids, then absent experts are copied into their slots.
typedef struct rotary_link_lookup {
    rotary_link_layer layer;
    rotary_page_ids   ids;       // in device memory
    int32_t *         slot_ids;  // in device memory
    uint64_t          number;    // counts this layer's lookups on the device, from 1
    bool              predicted; // a prediction of it was enqueued: its prefetches have to stop
} rotary_link_lookup;

// A prediction of the next layer's lookup: that layer's router, applied early to the input of this layer's experts. All
// pointers are to device memory; `state` is read before work that waits for this lookup runs, the others maybe later.
typedef struct rotary_link_prediction {
    rotary_link_layer layer;     // the next layer
    uint64_t          number;    // of the predicted lookup
    const float *     router;    // [n_embd, n_expert]
    const float *     scale;     // [n_embd] factors of the state
    const float *     bias;      // [n_expert] added to the products, or NULL
    const float *     selection; // [n_expert] added to the products' sigmoid, or NULL
    const char *      state;     // [n_embd, n_tokens] floats, `stride` bytes from one token to the next
    int64_t           stride;
    int32_t           n_embd, n_tokens, n_used;
    float *           copy;   // [n_embd, n_tokens] scratch for the state
    float *           scores; // [n_expert, n_tokens] scratch for the products
} rotary_link_prediction;

typedef struct rotary_link_api {
    int32_t      abi;  // ROTARY_LINK_ABI
    const char * kind; // "CUDA": the name of the ggml backend whose devices it serves

    // Open the device with this id (ggml's: the PCI bus id). NULL with a text in error[size].
    rotary_link * (*open)(const char * device_id, char * error, size_t size);
    void (*close)(rotary_link * link);               // waits
    const char * (*error)(const rotary_link * link); // of this thread's last failing call, until its next one

    // pin() page-locks host memory in place and returns its address on the device; host_new() returns new pinned memory
    // and stores its address on the device. NULL on failure.
    void * (*pin)(rotary_link * link, void * memory, size_t bytes, enum rotary_pin how);
    void (*unpin)(rotary_link * link, void * memory);
    void * (*host_new)(rotary_link * link, size_t bytes, void ** on_device);
    void (*host_free)(rotary_link * link, void * memory);

    bool (*wait)(rotary_link * link, void * event);                               // later work waits for the event
    bool (*record)(rotary_link * link, void * event);                             // the event waits for earlier work
    bool (*copy)(rotary_link * link, void * to, const void * from, size_t bytes); // waits if a host end is not pinned
    bool (*look_up)(rotary_link * link, const rotary_link_lookup * lookup,
                    const rotary_link_prediction * next);                         // `next` or NULL
    bool (*synchronize)(rotary_link * link);                                      // waits, for prefetches too
} rotary_link_api;

// The function that a link library exports.
const rotary_link_api * rotary_link_get(void);

#ifdef __cplusplus
}
#endif

// ---- pieces, into which experts are divided for copying

#define ROTARY_LINK_PIECE ((uint64_t) 16384)

ROTARY_BOTH int32_t rotary_link_n_pieces(const rotary_link_tensor & tensor) {
    return (int32_t) ((tensor.store_bytes + ROTARY_LINK_PIECE - 1) / ROTARY_LINK_PIECE);
}

struct rotary_link_piece {
    char *       to;
    const char * from;
    uint64_t     bytes;
};

// Piece `index` of an expert, counted over the layer's tensors.
ROTARY_BOTH rotary_link_piece rotary_link_piece_of(const rotary_link_layer & layer, const rotary_page & page,
                                                   int32_t index) {
    int32_t i = 0;
    for (; index >= rotary_link_n_pieces(layer.tensors[i]); i++) {
        index -= rotary_link_n_pieces(layer.tensors[i]);
    }
    const rotary_link_tensor & tensor = layer.tensors[i];
    const uint64_t             first  = ROTARY_LINK_PIECE * index;
    const uint64_t             left   = tensor.store_bytes - first;
    return { (char *) tensor.slots + tensor.slot_bytes * page.slot + first,
             (const char *) tensor.store + tensor.store_bytes * page.expert + first,
             left < ROTARY_LINK_PIECE ? left : ROTARY_LINK_PIECE };
}
