// SPDX-License-Identifier: MIT
//
// Link to CUDA devices. See link_api.h. The static CUDA runtime looks for the driver when it is first used, so this
// library loads on a machine without one and reports that there is no device. Streams, events and addresses belong to
// the device's primary context, which ggml-cuda uses too.

#include "link/link_api.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <string>

struct rotary_link {
    int          device;
    int          n_blocks;            // of gather_kernel: enough reads in flight to fill the bus
    cudaStream_t stream    = nullptr;
    cudaStream_t beside    = nullptr; // for prefetches
    cudaEvent_t  wanted    = nullptr; // the lookup's experts have been copied
    cudaEvent_t  predicted = nullptr; // prefetches have been copied, as far as there was time
};

static thread_local std::string last_error; // several threads share one link

// ---- kernels

static constexpr int team_size = 128;

// The threads of one block.
struct block_team {
    int64_t * keys;    // [team_size / 32], shared
    int32_t * indices; // [team_size / 32], shared

    __device__ int32_t rank() const { return (int32_t) threadIdx.x; }
    __device__ int32_t size() const { return (int32_t) blockDim.x; }
    __device__ void    sync() const { __syncthreads(); }
    __device__ void    add(int32_t * value, int32_t by) const { atomicAdd(value, by); }
    __device__ void    add(uint64_t * value, uint64_t by) const { atomicAdd((unsigned long long *) value, by); }
    __device__ bool    any(bool mine) const { return __syncthreads_or(mine) != 0; }

    __device__ int32_t min(int64_t key, int32_t index) const {
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
        __syncthreads(); // before the next call writes
        return index;
    }
};

// Block 0 resolves the lookup. The others, if any, copy the state before the computation overwrites it.
static __global__ void __launch_bounds__(team_size)
    resolve_kernel(rotary_page_table table, rotary_page_ids ids, int32_t * slot_ids, rotary_link_prediction next) {
    __shared__ int64_t keys[team_size / 32];
    __shared__ int32_t indices[team_size / 32];
    if (blockIdx.x == 0) {
        rotary_page_resolve(block_team{ keys, indices }, table, ids, slot_ids);
        return;
    }
    const int32_t n = next.n_embd * next.n_tokens;
    for (int32_t i = (blockIdx.x - 1) * team_size + threadIdx.x; i < n; i += (gridDim.x - 1) * team_size) {
        next.copy[i] = ((const float *) (next.state + next.stride * (i / next.n_embd)))[i % next.n_embd];
    }
}

// Announce the lookup, which stops its prefetches.
static __global__ void demand_kernel(rotary_page_state * state, uint64_t number) {
    atomicExch((unsigned long long *) &state->demanded, number);
}

// One warp for each product of the router.
static __global__ void __launch_bounds__(team_size) score_kernel(rotary_link_prediction next) {
    const int32_t index = (int32_t) (blockIdx.x * (team_size / 32) + threadIdx.x / 32);
    const int32_t n     = next.layer.table.n_expert;
    if (index >= n * next.n_tokens) {
        return;
    }
    const float * weights = next.router + (int64_t) (index % n) * next.n_embd;
    const float * state   = next.copy + (int64_t) (index / n) * next.n_embd;
    float         sum     = 0;
    for (int32_t i = threadIdx.x % 32; i < next.n_embd; i += 32) {
        sum += weights[i] * next.scale[i] * state[i];
    }
    for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_down_sync(0xffffffffu, sum, step);
    }
    if (threadIdx.x % 32 == 0) {
        sum += next.bias != nullptr ? next.bias[index % n] : 0;
        next.scores[index] = next.selection != nullptr ? 1 / (1 + expf(-sum)) + next.selection[index % n] : sum;
    }
}

static __global__ void __launch_bounds__(team_size) predict_kernel(rotary_link_prediction next) {
    __shared__ int64_t keys[team_size / 32];
    __shared__ int32_t indices[team_size / 32];
    rotary_page_predict(block_team{ keys, indices }, next.layer.table, next.scores, next.n_tokens, next.n_used);
}

static constexpr int gather_threads  = 256;
static constexpr int prefetch_blocks = 16; // few, to leave the multiprocessors to the computation

// A whole block copies n bytes. Both addresses are aligned as a GGUF file's tensors, by 32 bytes or more, if the size
// of an expert is a multiple of that.
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

static __global__ void __launch_bounds__(gather_threads) gather_kernel(rotary_link_layer layer) {
    const int32_t pieces = layer.table.n_pieces;
    const int64_t all    = (int64_t) pieces * layer.table.state->n_pages;
    for (int64_t index = blockIdx.x; index < all; index += gridDim.x) {
        const rotary_page page = layer.table.pages[index / pieces];
        if (index % pieces >= page.first) {
            const rotary_link_piece piece = rotary_link_piece_of(layer, page, (int32_t) (index % pieces));
            copy_by_block(piece.to, piece.from, piece.bytes);
        }
    }
}

// Blocks take pieces in order until the lookup that they are for has come. Each piece taken is copied, so `n_begun` tells
// which pieces have arrived.
static __global__ void __launch_bounds__(gather_threads) prefetch_kernel(rotary_link_layer layer, uint64_t number) {
    __shared__ uint32_t taken;

    rotary_page_state & state  = *layer.table.state;
    const uint32_t      pieces = layer.table.n_pieces;
    const uint32_t      all    = pieces * state.n_prefetches;
    while (true) {
        if (threadIdx.x == 0) {
            const bool late = *(const volatile uint64_t *) &state.demanded >= number;
            taken           = late ? all : atomicAdd(&state.n_begun, 1);
        }
        __syncthreads();
        const uint32_t index = taken;
        __syncthreads(); // before thread 0 changes `taken`
        if (index >= all) {
            return;
        }
        const rotary_link_piece piece =
            rotary_link_piece_of(layer, layer.table.prefetches[index / pieces], (int32_t) (index % pieces));
        copy_by_block(piece.to, piece.from, piece.bytes);
    }
}

// ---- interface

static bool ok(cudaError_t status, const char * what) {
    if (status != cudaSuccess) {
        last_error = std::string(what) + ": " + cudaGetErrorString(status);
        cudaGetLastError(); // clear it, or ggml would report it as its own
    }
    return status == cudaSuccess;
}

// Makes the link's device current, and restores ggml's at the end.
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
    for (cudaStream_t stream : { link->stream, link->beside }) {
        if (stream != nullptr) {
            cudaStreamSynchronize(stream);
            cudaStreamDestroy(stream);
        }
    }
    for (cudaEvent_t event : { link->wanted, link->predicted }) {
        if (event != nullptr) {
            cudaEventDestroy(event);
        }
    }
    delete link;
}

static rotary_link * link_open(const char * device_id, char * error, size_t size) {
    auto * link = new rotary_link{};
    if (!ok(cudaDeviceGetByPCIBusId(&link->device, device_id), "cudaDeviceGetByPCIBusId")) {
        snprintf(error, size, "%s", last_error.c_str());
        delete link;
        return nullptr;
    }
    const current_device scope(link);
    int                  n_processors = 0;
    // Copies that the computation waits for go before ggml's streams, which have the lowest priority.
    int lowest = 0, highest = 0;
    if (!ok(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, link->device), "processors") ||
        !ok(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange") ||
        !ok(cudaStreamCreateWithPriority(&link->stream, cudaStreamNonBlocking, highest), "cudaStreamCreate") ||
        !ok(cudaStreamCreateWithPriority(&link->beside, cudaStreamNonBlocking, lowest), "cudaStreamCreate") ||
        !ok(cudaEventCreateWithFlags(&link->wanted, cudaEventDisableTiming), "cudaEventCreate") ||
        !ok(cudaEventCreateWithFlags(&link->predicted, cudaEventDisableTiming), "cudaEventCreate")) {
        snprintf(error, size, "%s", last_error.c_str());
        link_close(link);
        return nullptr;
    }
    link->n_blocks = 2 * n_processors;
    return link;
}

static const char * link_error(const rotary_link *) {
    return last_error.c_str();
}

static void * link_pin(rotary_link * link, void * memory, size_t bytes, rotary_pin how) {
    const current_device scope(link);
    const unsigned       flags   = cudaHostRegisterMapped | cudaHostRegisterPortable |
                                   (how == ROTARY_PIN_READ_ONLY ? cudaHostRegisterReadOnly : 0);
    void *               address = nullptr;
    if (!ok(cudaHostRegister(memory, bytes, flags), "cudaHostRegister")) {
        return nullptr;
    }
    if (!ok(cudaHostGetDevicePointer(&address, memory, 0), "cudaHostGetDevicePointer")) {
        cudaHostUnregister(memory);
        return nullptr;
    }
    return address;
}

static void link_unpin(rotary_link * link, void * memory) {
    const current_device scope(link);
    ok(cudaHostUnregister(memory), "cudaHostUnregister");
}

static void * link_host_new(rotary_link * link, size_t bytes, void ** on_device) {
    const current_device scope(link);
    void *               memory = nullptr;
    if (!ok(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc")) {
        return nullptr;
    }
    if (!ok(cudaHostGetDevicePointer(on_device, memory, 0), "cudaHostGetDevicePointer")) {
        cudaFreeHost(memory);
        return nullptr;
    }
    return memory;
}

static void link_host_free(rotary_link * link, void * memory) {
    const current_device scope(link);
    ok(cudaFreeHost(memory), "cudaFreeHost");
}

static bool link_wait(rotary_link * link, void * event) {
    const current_device scope(link);
    return ok(cudaStreamWaitEvent(link->stream, (cudaEvent_t) event, 0), "cudaStreamWaitEvent");
}

static bool link_record(rotary_link * link, void * event) {
    const current_device scope(link);
    return ok(cudaEventRecord((cudaEvent_t) event, link->stream), "cudaEventRecord");
}

static bool link_copy(rotary_link * link, void * to, const void * from, size_t bytes) {
    const current_device scope(link);
    return ok(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, link->stream), "cudaMemcpyAsync");
}

// Predict and prefetch on the stream beside, once the lookup's experts have been copied.
static bool predict(rotary_link * link, const rotary_link_prediction * next) {
    const int n_products = next->layer.table.n_expert * next->n_tokens;
    const int n_blocks   = (n_products + team_size / 32 - 1) / (team_size / 32);
    if (!ok(cudaEventRecord(link->wanted, link->stream), "cudaEventRecord") ||
        !ok(cudaStreamWaitEvent(link->beside, link->wanted, 0), "cudaStreamWaitEvent")) {
        return false;
    }
    score_kernel<<<n_blocks, team_size, 0, link->beside>>>(*next);
    predict_kernel<<<1, team_size, 0, link->beside>>>(*next);
    prefetch_kernel<<<prefetch_blocks, gather_threads, 0, link->beside>>>(next->layer, next->number);
    return ok(cudaGetLastError(), "predicting") &&
           ok(cudaEventRecord(link->predicted, link->beside), "cudaEventRecord");
}

static bool link_look_up(rotary_link * link, const rotary_link_lookup * lookup, const rotary_link_prediction * next) {
    static constexpr int         copy_blocks = 4;
    const rotary_link_prediction none        = {};

    const current_device scope(link);
    if (lookup->predicted) {
        demand_kernel<<<1, 1, 0, link->stream>>>(lookup->layer.table.state, lookup->number);
        if (!ok(cudaStreamWaitEvent(link->stream, link->predicted, 0), "cudaStreamWaitEvent")) {
            return false;
        }
    }
    resolve_kernel<<<next != nullptr ? 1 + copy_blocks : 1, team_size, 0, link->stream>>>(
        lookup->layer.table, lookup->ids, lookup->slot_ids, next != nullptr ? *next : none);
    gather_kernel<<<link->n_blocks, gather_threads, 0, link->stream>>>(lookup->layer);
    return ok(cudaGetLastError(), "lookup") && (next == nullptr || predict(link, next));
}

static bool link_synchronize(rotary_link * link) {
    const current_device scope(link);
    return ok(cudaStreamSynchronize(link->stream), "cudaStreamSynchronize") &&
           ok(cudaStreamSynchronize(link->beside), "cudaStreamSynchronize");
}

const rotary_link_api * rotary_link_get(void) {
    static const rotary_link_api api = {
        /* .abi         = */ ROTARY_LINK_ABI,
        /* .kind        = */ "CUDA",
        /* .open        = */ link_open,
        /* .close       = */ link_close,
        /* .error       = */ link_error,
        /* .pin         = */ link_pin,
        /* .unpin       = */ link_unpin,
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
