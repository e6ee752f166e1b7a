// SPDX-License-Identifier: MIT
//
// Link: what moves experts to a device beside its computation, as a library of its own that libggml-rotary.so opens
// when its inner device is of that kind. The CUDA one is link.cu. A C interface of function pointers, so that neither
// needs the other to build.
//
// A link has one stream. It and the inner backend's stream wait for each other through events of the inner device
// (ggml's event->context: a cudaEvent_t), never through the host. Functions that return bool enqueue, unless they say
// that they wait; false leaves a text in error().

#pragma once

#include "page_table.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ROTARY_LINK_ABI 1
#define ROTARY_LINK_MOST_TENSORS 4

typedef struct rotary_link rotary_link;

enum rotary_lock { // how host memory is page-locked in place
    ROTARY_LOCK_READ_ONLY,
    ROTARY_LOCK_DEFAULT,
};

// Where one tensor of a layer comes from and goes to. `store` is an address that the device can read.
typedef struct rotary_link_tensor {
    const void * store;       // expert 0
    void *       slots;       // slot 0
    uint64_t     store_bytes; // of one expert, and from one to the next
    uint64_t     slot_bytes;  // from one slot to the next
} rotary_link_tensor;

// One lookup, resolved on the device: ids -> slot ids, then the absent experts into their slots.
typedef struct rotary_link_lookup {
    rotary_page_table  table;    // in device memory
    rotary_page_ids    ids;      // in device memory
    int32_t *          slot_ids; // in device memory
    int32_t            n_tensors;
    rotary_link_tensor tensors[ROTARY_LINK_MOST_TENSORS];
} rotary_link_lookup;

typedef struct rotary_link_api {
    int32_t      abi;  // ROTARY_LINK_ABI
    const char * kind; // "CUDA": the name of the ggml backend whose devices it serves

    // The device with this id (ggml's: the PCI bus id). NULL with a text in error[size].
    rotary_link * (*open)(const char * device_id, char * error, size_t size);
    void (*close)(rotary_link * link); // waits
    const char * (*error)(const rotary_link * link);

    // Page-lock host memory where it is, or get page-locked memory; the address at which the device sees it, NULL if
    // that cannot be done.
    void * (*lock)(rotary_link * link, void * memory, size_t bytes, enum rotary_lock how);
    void (*unlock)(rotary_link * link, void * memory);
    void * (*host_new)(rotary_link * link, size_t bytes, void ** on_device);
    void (*host_free)(rotary_link * link, void * memory);

    bool (*wait)(rotary_link * link, void * event);   // what follows waits for the event
    bool (*record)(rotary_link * link, void * event); // the event waits for what went before
    bool (*copy)(rotary_link * link, void * to, const void * from, size_t bytes); // host ends: page-locked, or it waits
    bool (*look_up)(rotary_link * link, const rotary_link_lookup * lookup);
    bool (*synchronize)(rotary_link * link);                                      // waits
} rotary_link_api;

// What a link library exports.
const rotary_link_api * rotary_link_get(void);

#ifdef __cplusplus
}
#endif
