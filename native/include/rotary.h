// SPDX-License-Identifier: MIT
//
// rotary.h: the public C API of libggml-rotary.so, and the single truth from which the Python binding is made.
//
// It configures paging and reports on it. Loading a model and running it stay llama.cpp's own API: llama.cpp finds
// the ROTARY<i> devices through ggml's backend registry once the library has been loaded with ggml_backend_load().
//
// Threading: every function may be called from any thread. rotary_last_error() is per thread.
// Errors: functions that can fail return a negative enum rotary_status (or NULL) and leave one line of text for
// rotary_last_error(), in the form "<object>: <what failed, with values>; <limit>; <what to do>".
//
// The binding reads this file without a preprocessor: only declarations between the markers BEGIN API and END API,
// no macros in them, no conditional compilation.

#ifndef ROTARY_H
#define ROTARY_H

#include <stddef.h>
#include <stdint.h>


#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

// BEGIN API

enum rotary_status {
    ROTARY_OK          =  0,
    ROTARY_ERR_ARG     = -1, // an argument makes no sense
    ROTARY_ERR_VERSION = -2, // the loaded ggml is not the one this library was compiled against
    ROTARY_ERR_DEVICE  = -3, // no such inner device, or it cannot be used
    ROTARY_ERR_BUDGET  = -4, // the budget is below what one token needs
    ROTARY_ERR_MEMORY  = -5, // an allocation failed
    ROTARY_ERR_STATE   = -6, // not now: for example the inner device of a device that has models
    ROTARY_ERR_READ    = -7, // the model's file cannot be read, or is no longer the file that was loaded
};

enum rotary_path {
    ROTARY_PATH_NONE     = 0, // not sized yet
    ROTARY_PATH_SLOTS    = 1, // experts are paged into slots
    ROTARY_PATH_RESIDENT = 2, // every expert of the layer has its slot, filled once
    ROTARY_PATH_MAPPED   = 3, // every expert fits and the inner device computes straight from the mapping: no copy
};

enum rotary_store {
    ROTARY_STORE_AUTO   = 0, // not chosen yet
    ROTARY_STORE_MMAP   = 1, // experts come from llama.cpp's mapping of the file, through the page cache
    ROTARY_STORE_DIRECT = 2, // experts are read from the file past the page cache, many requests in flight
    ROTARY_STORE_MEMORY = 3, // llama.cpp has copied them into memory (no mmap)
};

enum rotary_io {
    ROTARY_IO_NONE     = 0,
    ROTARY_IO_URING    = 1, // io_uring
    ROTARY_IO_THREADS  = 2, // a few threads with pread, where the kernel or a container forbids io_uring
};

// ---- library ------------------------------------------------------------------------------------------------------

// Version of this header's ABI; the binding refuses a library that answers another number than it was made for.
int32_t rotary_abi_version(void);

// Size in bytes of one of this header's structs by its name ("rotary_config", "rotary_stats", ...); 0 if unknown.
size_t rotary_sizeof(const char * struct_name);

// ggml_version() and ggml_commit() of the source this library was compiled against, and the machine it was built for
// ("x86_64", "aarch64", ...). Static strings.
const char * rotary_built_ggml_version(void);
const char * rotary_built_ggml_commit(void);
const char * rotary_built_machine(void);

// Whether the CPU backend of the ggml in this process runs on this processor: 0 if a small graph, computed in a child
// process, dies of an illegal instruction; else 1, also where no child can be had.
int32_t rotary_cpu_runs(void);

// Status of the last error on this thread, for functions that return a pointer; ROTARY_OK if none.
int32_t rotary_last_status(void);

// Text of the last error on this thread, "" if none. Valid until the next failing call on this thread.
const char * rotary_last_error(void);

// Forget this thread's last error, to tell a new one from an old one.
void rotary_clear_error(void);

// ---- devices ------------------------------------------------------------------------------------------------------

// ROTARY devices, one for each inner device. Chosen when the library is loaded: those named by the environment
// variable ROTARY_INNER (comma separated ggml device names, or rpc://host:port for that server's first device), else
// every GPU, else the CPU.
int32_t      rotary_device_count(void);
const char * rotary_device_name(int32_t device);       // "ROTARY0"; NULL if there is no such device
const char * rotary_device_inner(int32_t device);      // as it was named: "CPU", "CUDA0", "rpc://127.0.0.1:50052"

// Make `device` wrap another inner device. ROTARY_ERR_STATE while a model or a backend uses it.
int32_t rotary_device_set_inner(int32_t device, const char * inner);

// ---- eviction policies ---------------------------------------------------------------------------------------------

// Each layer's eviction policy picks the victim when a slot is wanted. Names: rotary_policy_names(), comma separated,
// static.
const char * rotary_policy_names(void);

// A policy of the caller's own. `layer` is the model's layer number. Called while a graph runs, from the graph's thread.
typedef struct rotary_policy {
    void * user;
    // A routing, ids[n_tokens][n_used] with the router's weights, or NULL where they are not known, before any of these
    // experts enters a slot.
    void (*note)(void * user, int32_t layer, const int32_t * ids, const float * weights, int32_t n_used,
                 int32_t n_tokens);
    void (*enter)(void * user, int32_t layer, int32_t expert, int32_t wanted); // wanted 0: prefetched, and not used
    void (*leave)(void * user, int32_t layer, int32_t expert);
    void (*resize)(void * user, int32_t layer, int32_t n_slots); // the layer has this many slots from now on
    // The victim among these residents, which are in the order of their slots; anything else means the first of them.
    int32_t (*choose)(void * user, int32_t layer, const int32_t * candidates, int32_t n);
} rotary_policy;

// ---- predictors ----------------------------------------------------------------------------------------------------

// A predictor names what the next layers will want, so that it is prefetched. Names: "auto", the next layers' routers, and
// the best predictor from routings where those cannot be had; "router", those alone; and the predictors from routings,
// rotary_predictor_names(), comma separated, static.
const char * rotary_predictor_names(void);

// A predictor of the caller's own. Layers are numbered from 0 among those that are paged. Called while a graph runs, from
// the graph's thread.
typedef struct rotary_predictor {
    void * user;
    // A routing when it is made, ids[n_tokens][n_used].
    void (*note)(void * user, int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens);
    // After the routing of `layer`: write what layer `ahead` will want for the last token, likeliest first, into experts[n];
    // return how many.
    int32_t (*name)(void * user, int32_t layer, int32_t ahead, int32_t * experts, int32_t n);
} rotary_predictor;

// ---- pools --------------------------------------------------------------------------------------------------------

// A pool is the slots of one model on one device, with its budget and its counters.
typedef struct rotary_pool rotary_pool;

typedef struct rotary_config {
    size_t       struct_size;   // sizeof(rotary_config), for checking
    const char * budget;        // "auto", "min", "25%" or "0.25", "8GiB", "1000000" (bytes), "16 slots" (per layer)
    const char * model;         // name for messages; may be NULL
    uint64_t     margin_bytes;  // "auto" leaves this much of the inner device's memory free; 0 for the default
    int32_t      repack;        // CPU inner device: 1 slots in the CPU's repacked layout where it has one (as stock
                                // llama.cpp loads weights), 0 plain layout (as stock with use_extra_bufts = false)
    int32_t      direct;        // 1 lets a host inner device compute a batch that wants more experts than there are
                                // slots straight from the mapping; 0 always pages (waves)
    const char * store;         // "auto", "mmap" or "direct"; NULL is "auto": direct where the experts do not fit into
                                // the memory that is available
    int32_t      prefetch;      // 1 reads the experts that the next layers will probably want while the disk is idle
    int32_t      adaptive;      // 1 lets slots be rebalanced between layers, on a host inner device
    uint64_t     staging_bytes; // direct: memory for reads in flight; 0 for the default
    const char * pin;           // "auto", "on" or "off": whether experts may be pinned where they lie, for a GPU to
                                // read; NULL is "auto": if they take no more than 3/4 of the available memory
    const char * policy;        // by name; NULL is "auto": the best that can run where lookups are resolved
    const rotary_policy * own_policy; // instead of that; must outlive the pool
    const char * predictor;     // by name; NULL is "auto"
    const rotary_predictor * own_predictor; // instead of that; must outlive the pool
} rotary_config;

typedef struct rotary_stats {
    // what was chosen
    uint64_t budget_bytes;       // slots' bytes as resolved from the budget text
    uint64_t slot_bytes;         // bytes really allocated for slots; 0 on the mapped path
    uint64_t expert_bytes;       // bytes of all paged experts
    uint64_t min_budget_bytes;   // one token's experts in every layer
    uint64_t staging_bytes;      // reads in flight and scratch of the waves
    uint64_t ram_bytes;          // of the tier of slots in RAM in front of a GPU's; direct store
    uint64_t locked_bytes;       // pinned host memory, such as the experts where they lie
    uint64_t resident_bytes;     // direct: mapped weights that are not experts, copied out of the page cache
    int32_t  n_layers;           // paged layers
    int32_t  n_expert;           // largest over layers
    int32_t  n_expert_used;      // largest over layers
    int32_t  n_slots;            // smallest over layers
    int32_t  path;               // enum rotary_path; the lowest over layers
    int32_t  repacked;           // 1 if slots are in a repacked layout
    int32_t  n_notices;          // fallbacks and choices worth saying, see rotary_pool_notice
    int32_t  store;              // enum rotary_store
    int32_t  io;                 // enum rotary_io
    int32_t  reserved;
    // counters since the pool was opened or reset. A request is one (token, expert) routing.
    uint64_t lookups;            // times a layer's routing was resolved
    uint64_t device_lookups;     // of these, by the inner device itself: the host did not wait
    uint64_t requests;
    uint64_t hits;               // requests whose expert was resident or already being paged for the same lookup
    uint64_t misses;             // page-ins: distinct absent experts, once per lookup
    uint64_t bypassed;           // misses computed straight from the mapping, nothing copied
    uint64_t evictions;
    uint64_t bytes_paged;
    uint64_t waves;              // passes beyond the first when a batch wanted more experts than slots
    uint64_t waits;              // times the host waited for the inner device to learn the routing
    uint64_t wait_us;
    uint64_t page_us;            // time spent moving experts into slots
    // store direct
    uint64_t reads;              // requests to the kernel; neighbours in the file are one
    uint64_t bytes_read;
    uint64_t ram_hits;           // misses of a GPU's slots that were in those in RAM
    uint64_t bytes_in_place;     // of bytes_read, read straight into slots: not copied
    uint64_t read_us;            // time with at least one read in flight
    uint64_t stall_us;           // time the computation waited for reads
    uint64_t shrinks;            // times slots were given back because memory ran short
    uint64_t slot_moves;         // slots that were rebalanced from one layer to another
    // prefetch. accuracy = prefetch_used / prefetched; coverage = prefetch_used / misses;
    // timeliness = (prefetch_used - late_hits) / prefetch_used
    uint64_t predicted;          // experts predicted for a layer, resident ones included
    uint64_t predicted_right;    // those that the layer then chose
    uint64_t prefetched;         // experts whose read began before their layer's routing was known
    uint64_t prefetch_used;      // misses that found their expert prefetched or in flight
    uint64_t late_hits;          // of these, still in flight
} rotary_stats;

typedef struct rotary_layer_stats {
    int32_t  il;                 // layer number from the tensor's name ("blk.<il>."), -1 if it has none
    int32_t  n_expert;
    int32_t  n_expert_used;
    int32_t  n_slots;
    int32_t  path;               // enum rotary_path
    int32_t  n_resident;         // experts resident now
    uint64_t expert_bytes;       // bytes of one expert, all its tensors
    uint64_t lookups;
    uint64_t requests;
    uint64_t hits;
    uint64_t misses;
    uint64_t bypassed;
    uint64_t evictions;
    uint64_t bytes_paged;
    uint64_t waves;
} rotary_layer_stats;

// Open a pool on `device`: paged weights that llama.cpp loads on this device from now on belong to it, until the next
// rotary_pool_open for the device. Without any, one pool per device is made from the environment
// (ROTARY_BUDGET, ROTARY_MARGIN, ROTARY_REPACK, ROTARY_DIRECT, ROTARY_STORE, ROTARY_PREFETCH, ROTARY_STAGING). NULL on
// error.
rotary_pool * rotary_pool_open(int32_t device, const rotary_config * config);

// Stop collecting and drop the caller's reference. Slots are freed when the model's buffers are gone too.
void rotary_pool_close(rotary_pool * pool);

// Resolve the budget and allocate the slots now, rather than at the first graph. Call it after the contexts are made:
// "auto" then sees what KV cache and compute buffers left. A pool without paged weights is ROTARY_OK.
int32_t rotary_pool_prepare(rotary_pool * pool);

// Change the budget. The slots are allocated anew, cold, at the next graph or rotary_pool_prepare.
int32_t rotary_pool_set_budget(rotary_pool * pool, const char * budget);

// Figures may be asked for at any time, by a policy, a predictor or a log callback too: they are of the graphs that have
// ended, and of the one that runs as far as the host resolves its lookups.
int32_t      rotary_pool_stats(rotary_pool * pool, rotary_stats * stats);
int32_t      rotary_pool_layer_stats(rotary_pool * pool, int32_t index, rotary_layer_stats * stats);
void         rotary_pool_reset_counters(rotary_pool * pool);

// Text of notice `index`, NULL past the end; valid while the pool is open.
const char * rotary_pool_notice(rotary_pool * pool, int32_t index);

// ---- budget: how a text is divided into slots (pure logic, the same code that sizes a pool) -------------------------

typedef struct rotary_layer_size {
    uint64_t expert_bytes;  // one expert, all its tensors
    int32_t  n_expert;
    int32_t  n_expert_used; // per token: the fewest slots a layer may have
} rotary_layer_size;

// Divide `budget` (a text as in rotary_config) over n_layers layers; `free_bytes` is what "auto" may take. n_slots
// receives each layer's slots, bytes what the text stands for. ROTARY_ERR_ARG: not a budget, or "off";
// ROTARY_ERR_BUDGET: below one token's experts, whose bytes are then in `bytes`.
int32_t rotary_budget_divide(const char * budget, const rotary_layer_size * layers, int32_t n_layers,
                             uint64_t free_bytes, int32_t * n_slots, uint64_t * bytes);

// Fill the slots of layer `il` with these experts, the most wanted first, whenever they are allocated, as far as there
// are slots for them. ROTARY_ERR_STATE once they are allocated.
int32_t rotary_pool_warm(rotary_pool * pool, int32_t il, const int32_t * experts, int32_t n);

// What a profile says of layer `il`, for predictors that learn from routings: the share of n_tokens that chose each
// expert, popularity[n_expert], and pairs[n_expert][n_expert], how often the later expert was chosen with one of the paged
// layer before, of the latter's uses; NULL for the first. ROTARY_ERR_STATE once slots are allocated.
int32_t rotary_pool_learn(rotary_pool * pool, int32_t il, const float * popularity, const float * pairs,
                          int32_t n_expert, int64_t n_tokens);

// The name of the predictor in use, "own" for the caller's, "" where nothing is predicted. Copied into text[n].
void rotary_pool_predictor(rotary_pool * pool, char * text, size_t n);

// The name of the eviction policy in use, "own" for the caller's, "" before slots are allocated. Static.
const char * rotary_pool_policy(rotary_pool * pool);

// Record routings from now on. While it is on, the host learns each, also where a GPU would resolve it itself.
int32_t rotary_pool_trace(rotary_pool * pool, int32_t on);

// Take what has been recorded: for each lookup layer number, n_tokens, n_used, whether weights are known; ids[n_tokens]
// [n_used]; the bits of as many floats, the router's weights; as many 0 or 1, whether the expert was there. Returns how
// many numbers there are: if more than n, nothing is taken. n_untraced: lookups dropped since nobody took them in time.
int64_t rotary_pool_trace_read(rotary_pool * pool, int32_t * records, int64_t n, uint64_t * n_untraced);

// ---- slot table: which expert is in which slot (pure logic, exposed for tests and simulators) ----------------------

typedef struct rotary_slots rotary_slots;

typedef struct rotary_load {
    int32_t expert;   // to be paged in
    int32_t slot;     // into this slot
    int32_t evicted;  // the expert that was there, -1 if the slot was free
} rotary_load;

// NULL if n_expert < 1, n_slots < 1 or n_slots > n_expert.
rotary_slots * rotary_slots_new(int32_t n_expert, int32_t n_slots);
void           rotary_slots_free(rotary_slots * slots);

// Make every expert in ids[n_ids] (repeats allowed) resident, evicting the least recently used ones that are not among
// them. slot_ids[n_ids] receives each one's slot; loads must have room for n_slots entries. Returns the number of
// loads, or ROTARY_ERR_ARG: an id out of range, or more distinct ids than slots (nothing is changed then).
int32_t rotary_slots_resolve(rotary_slots * slots, const int32_t * ids, int32_t n_ids, int32_t * slot_ids,
                             rotary_load * loads);

int32_t rotary_slots_slot_of(const rotary_slots * slots, int32_t expert); // -1 if absent
int32_t rotary_slots_expert_of(const rotary_slots * slots, int32_t slot); // -1 if free; the expert that a reserved slot is for
int32_t rotary_slots_n_slots(const rotary_slots * slots);
int32_t rotary_slots_n_resident(const rotary_slots * slots);
void    rotary_slots_clear(rotary_slots * slots);

// Reserve a slot for an absent expert that is being prefetched, evicting the least recently used expert that is not among
// keep[n_keep]. The slot is not evicted until the expert is resolved, as a load into that slot, or the reservation ends:
// `resident` makes the expert resident, as the next victim; else the slot is free. Return the slot, or ROTARY_ERR_BUDGET if
// there is none; 0; ROTARY_ERR_ARG if no slot can be reserved for the expert, or none is.
int32_t rotary_slots_reserve(rotary_slots * slots, int32_t expert, const int32_t * keep, int32_t n_keep);
int32_t rotary_slots_end_reservation(rotary_slots * slots, int32_t expert, bool resident);

// Slot tables of all layers of a model, with one policy: what a pool has, for replaying traces. `policy` by name, or
// `own`. NULL with this thread's error.
typedef struct rotary_cache rotary_cache;

// `adaptive` 0: layers keep the slots they are given; else slots are rebalanced, none below `least`, as in rotary_config.
rotary_cache * rotary_cache_new(const char * policy, const rotary_policy * own, int32_t n_layers, int32_t n_expert,
                                const int32_t * n_slots, int32_t adaptive, int32_t least);
void           rotary_cache_free(rotary_cache * cache);

// As rotary_slots_resolve(), for ids[n_tokens][n_used] with the router's weights or NULL.
int32_t rotary_cache_resolve(rotary_cache * cache, int32_t layer, const int32_t * ids, const float * weights,
                             int32_t n_used, int32_t n_tokens, int32_t * slot_ids, rotary_load * loads);

// Resolve n_rows of ids[n_rows][n_used], -1 at a row's end where it has fewer, of layers[n_rows], one after the other:
// misses[n_rows]. ROTARY_ERR_ARG where one cannot be.
int32_t rotary_cache_replay(rotary_cache * cache, int64_t n_rows, const int32_t * layers, const int32_t * ids,
                            const float * weights, int32_t n_used, int32_t * misses);

// A predictor by itself, for replaying traces. NULL with this thread's error.
typedef struct rotary_foresight rotary_foresight;

rotary_foresight * rotary_foresight_new(const char * predictor, const rotary_predictor * own, int32_t n_layers,
                                        int32_t n_expert);
void               rotary_foresight_free(rotary_foresight * foresight);
void               rotary_foresight_note(rotary_foresight * foresight, int32_t layer, const int32_t * ids, int32_t n_used,
                                         int32_t n_tokens);
// As rotary_pool_learn(), with the popularity of the layer before.
void               rotary_foresight_learn(rotary_foresight * foresight, int32_t layer, const float * popularity,
                                          const float * pairs, const float * popularity_before, int64_t n_tokens);
int32_t            rotary_foresight_name(rotary_foresight * foresight, int32_t layer, int32_t ahead, int32_t * experts,
                                         int32_t n);

// The table of one layer, which stays the cache's. NULL if there is no such layer.
rotary_slots * rotary_cache_layer(rotary_cache * cache, int32_t layer);

// END API

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif // ROTARY_H
