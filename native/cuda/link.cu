// SPDX-License-Identifier: MIT
//
// Link to CUDA devices. See link.h. Linked with the static runtime, which finds the driver when it is first used, so
// this library loads, and says that there is no device, on a machine without one. Streams, events and addresses are
// those of the device's primary context, which ggml-cuda uses too.

#include "link.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <string>

struct rotary_link {
    int          device;
    int          n_blocks; // of a gather: enough reads in flight to fill the bus
    cudaStream_t stream = nullptr;
    std::string  text;
};

// ---- kernels

static constexpr int team_size = 128;

// The threads of one block.
struct block_team {
    int64_t * keys;    // [team_size / 32], shared
    int32_t * indices; // [team_size / 32], shared

    __device__ int32_t rank() const { return (int32_t) threadIdx.x; }
    __device__ int32_t size() const { return (int32_t) blockDim.x; }
    __device__ void    sync() const { __syncthreads(); }
    __device__ void    raise(int64_t * value, int64_t to) const { atomicMax((long long *) value, (long long) to); }
    __device__ bool    any(bool mine) const { return __syncthreads_or(mine) != 0; }

    __device__ int32_t least(int64_t key, int32_t index) const {
        for (int step = 16; step > 0; step /= 2) {
            const int64_t other_key   = __shfl_down_sync(0xffffffffu, (long long) key, step);
            const int32_t other_index = __shfl_down_sync(0xffffffffu, index, step);
            if (other_key < key || (other_key == key && (uint32_t) other_index < (uint32_t) index)) {
                key   = other_key;
                index = other_index;
            }
        }
        if (threadIdx.x % 32 == 0) {
            keys[threadIdx.x / 32]    = key;
            indices[threadIdx.x / 32] = index;
        }
        __syncthreads();
        for (int warp = 0; warp < team_size / 32; warp++) {
            if (keys[warp] < key || (keys[warp] == key && (uint32_t) indices[warp] < (uint32_t) index) || warp == 0) {
                key   = keys[warp];
                index = indices[warp];
            }
        }
        __syncthreads(); // before the next round writes
        return index;
    }
};

static __global__ void __launch_bounds__(team_size)
    resolve_kernel(rotary_page_table table, rotary_page_ids ids, int32_t * slot_ids) {
    __shared__ int64_t keys[team_size / 32];
    __shared__ int32_t indices[team_size / 32];
    rotary_page_resolve(block_team{ keys, indices }, table, ids, slot_ids);
}

static constexpr int    gather_threads = 256;
static constexpr size_t gather_bytes   = 16 * 4 * gather_threads; // that a block moves at a time

struct gather_tensors {
    int32_t            n;
    rotary_link_tensor of[ROTARY_LINK_MOST_TENSORS];
};

// Bytes [0, n) by a whole block. Both ends have the alignment of a GGUF file's tensors, 32 bytes at the least, where
// an expert's size does too.
static __device__ void copy_by_block(char * to, const char * from, size_t n) {
    const bool aligned = (((uintptr_t) to | (uintptr_t) from) & 15) == 0;
    size_t     done    = 0;
    if (aligned) {
        const auto * source = (const int4 *) from;
        auto *       target = (int4 *) to;
        const size_t units  = n / 16;
        for (size_t i = threadIdx.x; i < units; i += 4 * gather_threads) {
            int4 part[4]; // all four on their way before the first is stored
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (i + k * gather_threads < units) {
                    part[k] = __ldcs(source + i + k * gather_threads);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (i + k * gather_threads < units) {
                    target[i + k * gather_threads] = part[k];
                }
            }
        }
        done = units * 16;
    }
    for (size_t i = done + threadIdx.x; i < n; i += gather_threads) {
        to[i] = from[i];
    }
}

static __global__ void __launch_bounds__(gather_threads)
    gather_kernel(const rotary_page_state * state, const rotary_page * pages, gather_tensors tensors) {
    size_t pieces = 0; // of one expert
    for (int32_t i = 0; i < tensors.n; i++) {
        pieces += (tensors.of[i].store_bytes + gather_bytes - 1) / gather_bytes;
    }
    const size_t all = pieces * state->n_pages;
    for (size_t index = blockIdx.x; index < all; index += gridDim.x) {
        const rotary_page page  = pages[index / pieces];
        size_t            piece = index % pieces;
        int32_t           i     = 0;
        for (; piece >= (tensors.of[i].store_bytes + gather_bytes - 1) / gather_bytes; i++) {
            piece -= (tensors.of[i].store_bytes + gather_bytes - 1) / gather_bytes;
        }
        const rotary_link_tensor & tensor = tensors.of[i];
        const size_t               first  = piece * gather_bytes;
        const size_t               left   = tensor.store_bytes - first;
        copy_by_block((char *) tensor.slots + tensor.slot_bytes * page.slot + first,
                      (const char *) tensor.store + tensor.store_bytes * page.expert + first,
                      left < gather_bytes ? left : gather_bytes);
    }
}

// ---- interface

static bool ok(rotary_link * link, cudaError_t status, const char * what) {
    if (status != cudaSuccess) {
        link->text = std::string(what) + ": " + cudaGetErrorString(status);
        cudaGetLastError(); // of ours: ggml must not find it
    }
    return status == cudaSuccess;
}

// The caller's current device is ggml's business.
struct current_device {
    int before = 0;
    explicit current_device(const rotary_link * link) {
        cudaGetDevice(&before);
        if (before != link->device) {
            cudaSetDevice(link->device);
        }
    }
    ~current_device() { cudaSetDevice(before); }
};

static void link_close(rotary_link * link) {
    const current_device scope(link);
    if (link->stream != nullptr) {
        cudaStreamSynchronize(link->stream);
        cudaStreamDestroy(link->stream);
    }
    delete link;
}

static rotary_link * link_open(const char * device_id, char * error, size_t size) {
    auto * link = new rotary_link{};
    if (!ok(link, cudaDeviceGetByPCIBusId(&link->device, device_id), "cudaDeviceGetByPCIBusId")) {
        snprintf(error, size, "%s", link->text.c_str());
        delete link;
        return nullptr;
    }
    const current_device scope(link);
    int                  n_processors = 0;
    // Above ggml's streams, which have the lowest priority: what computation waits for goes first.
    int lowest = 0, highest = 0;
    if (!ok(link, cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, link->device), "processors") ||
        !ok(link, cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange") ||
        !ok(link, cudaStreamCreateWithPriority(&link->stream, cudaStreamNonBlocking, highest), "cudaStreamCreate")) {
        snprintf(error, size, "%s", link->text.c_str());
        link_close(link);
        return nullptr;
    }
    link->n_blocks = 2 * n_processors;
    return link;
}

static const char * link_error(const rotary_link * link) {
    return link->text.c_str();
}

static void * link_lock(rotary_link * link, void * memory, size_t bytes, rotary_lock how) {
    const current_device scope(link);
    const unsigned       flags   = cudaHostRegisterMapped | cudaHostRegisterPortable |
                                   (how == ROTARY_LOCK_READ_ONLY ? cudaHostRegisterReadOnly : 0);
    void *               address = nullptr;
    if (!ok(link, cudaHostRegister(memory, bytes, flags), "cudaHostRegister")) {
        return nullptr;
    }
    if (!ok(link, cudaHostGetDevicePointer(&address, memory, 0), "cudaHostGetDevicePointer")) {
        cudaHostUnregister(memory);
        return nullptr;
    }
    return address;
}

static void link_unlock(rotary_link * link, void * memory) {
    const current_device scope(link);
    ok(link, cudaHostUnregister(memory), "cudaHostUnregister");
}

static void * link_host_new(rotary_link * link, size_t bytes, void ** on_device) {
    const current_device scope(link);
    void *               memory = nullptr;
    if (!ok(link, cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc")) {
        return nullptr;
    }
    if (!ok(link, cudaHostGetDevicePointer(on_device, memory, 0), "cudaHostGetDevicePointer")) {
        cudaFreeHost(memory);
        return nullptr;
    }
    return memory;
}

static void link_host_free(rotary_link * link, void * memory) {
    const current_device scope(link);
    ok(link, cudaFreeHost(memory), "cudaFreeHost");
}

static bool link_wait(rotary_link * link, void * event) {
    const current_device scope(link);
    return ok(link, cudaStreamWaitEvent(link->stream, (cudaEvent_t) event, 0), "cudaStreamWaitEvent");
}

static bool link_record(rotary_link * link, void * event) {
    const current_device scope(link);
    return ok(link, cudaEventRecord((cudaEvent_t) event, link->stream), "cudaEventRecord");
}

static bool link_copy(rotary_link * link, void * to, const void * from, size_t bytes) {
    const current_device scope(link);
    return ok(link, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, link->stream), "cudaMemcpyAsync");
}

static bool link_look_up(rotary_link * link, const rotary_link_lookup * lookup) {
    const current_device scope(link);
    gather_tensors       tensors = { lookup->n_tensors, {} };
    for (int32_t i = 0; i < lookup->n_tensors; i++) {
        tensors.of[i] = lookup->tensors[i];
    }
    resolve_kernel<<<1, team_size, 0, link->stream>>>(lookup->table, lookup->ids, lookup->slot_ids);
    gather_kernel<<<link->n_blocks, gather_threads, 0, link->stream>>>(lookup->table.state, lookup->table.pages,
                                                                       tensors);
    return ok(link, cudaGetLastError(), "lookup");
}

static bool link_synchronize(rotary_link * link) {
    const current_device scope(link);
    return ok(link, cudaStreamSynchronize(link->stream), "cudaStreamSynchronize");
}

const rotary_link_api * rotary_link_get(void) {
    static const rotary_link_api api = {
        /* .abi         = */ ROTARY_LINK_ABI,
        /* .kind        = */ "CUDA",
        /* .open        = */ link_open,
        /* .close       = */ link_close,
        /* .error       = */ link_error,
        /* .lock        = */ link_lock,
        /* .unlock      = */ link_unlock,
        /* .host_new    = */ link_host_new,
        /* .host_free   = */ link_host_free,
        /* .wait        = */ link_wait,
        /* .record      = */ link_record,
        /* .copy        = */ link_copy,
        /* .look_up     = */ link_look_up,
        /* .synchronize = */ link_synchronize,
    };
    return &api;
}
