// SPDX-License-Identifier: MIT
//
// rotary.h: the public C API of libggml-rotary.so. The Python binding is made from this file alone.
//
// The API configures paging and reports on it. Models are loaded and run by llama.cpp's own API, which finds the
// ROTARY<i> devices in ggml's backend registry once the library has been loaded with ggml_backend_load().
//
// Threading: every function may be called from any thread. rotary_last_error() is per thread.
// Errors: functions that can fail return a negative enum rotary_status (or NULL) and leave one line of text for
// rotary_last_error(), in the form "<object>: <what failed, with values>; <limit>; <what to do>". Those that return
// nothing leave the same for rotary_last_status().
//
// The binding reads this file without a preprocessor: only declarations between the markers BEGIN API and END API,
// no macros in them, no conditional compilation.

#ifndef ROTARY_H
#define ROTARY_H

#include <stdbool.h>
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
    ROTARY_ERR_STATE   = -6, // not possible now, such as changing the inner device of a device that has models
    ROTARY_ERR_READ    = -7, // the model's file cannot be read, or is no longer the file that was loaded
};

enum rotary_path {
    ROTARY_PATH_NONE     = 0, // no slots allocated yet
    ROTARY_PATH_SLOTS    = 1, // experts are paged into slots
    ROTARY_PATH_RESIDENT = 2, // every expert of the layer has a slot, filled once
    ROTARY_PATH_MAPPED   = 3, // every expert fits, and the inner device computes from the mapping without a copy
};

enum rotary_store {
    ROTARY_STORE_AUTO   = 0, // not chosen yet
    ROTARY_STORE_MMAP   = 1, // experts come from llama.cpp's mapping of the file, through the page cache
    ROTARY_STORE_DIRECT = 2, // experts are read from the file past the page cache, many requests in flight
    ROTARY_STORE_MEMORY = 3, // llama.cpp has read experts into memory (no mmap)
};

enum rotary_io {
    ROTARY_IO_NONE     = 0,
    ROTARY_IO_URING    = 1, // io_uring
    ROTARY_IO_THREADS  = 2, // a few threads with pread, where the kernel or a container forbids io_uring
};

// ---- library ------------------------------------------------------------------------------------------------------

// Version of this header's ABI; the binding refuses a library of another version.
int32_t rotary_abi_version(void);

// Size in bytes of the struct of this name in this header ("rotary_config", "rotary_stats", ...); 0 if there is none.
size_t rotary_sizeof(const char * struct_name);

// ggml_version() and ggml_commit() of the source this library was compiled against. Static strings.
const char * rotary_built_ggml_version(void);
const char * rotary_built_ggml_commit(void);

// Whether the CPU backend of the ggml in this process runs on this processor: 0 if computing a small graph in a child
// process ends with an illegal instruction; else 1, also if no child process can be started.
int32_t rotary_cpu_runs(void);

// Status of this thread's last error, for functions that return a pointer; ROTARY_OK if none.
int32_t rotary_last_status(void);

// Text of this thread's last error, "" if none. Valid until the thread's next failing call.
const char * rotary_last_error(void);

// Clear this thread's last error, so that a later one can be told from it.
void rotary_clear_error(void);

// ---- devices ------------------------------------------------------------------------------------------------------

// ROTARY devices, one for each inner device. Inner devices are chosen when the library is loaded: those in the
// environment variable ROTARY_INNER (comma separated ggml device names, or rpc://host:port for that server's first
// device), else every GPU, else the CPU.
int32_t      rotary_device_count(void);
const char * rotary_device_name(int32_t device);       // "ROTARY0"; NULL if there is no such device
const char * rotary_device_inner(int32_t device);      // as named: "CPU", "CUDA0", "rpc://127.0.0.1:50052"

// Make `device` wrap another inner device. ROTARY_ERR_STATE while a pool, a model or a backend uses `device`.
int32_t rotary_device_set_inner(int32_t device, const char * inner);

// ---- eviction policies ---------------------------------------------------------------------------------------------

// A layer's eviction policy picks the victim when a slot is wanted. Names of all policies, comma separated, static.
const char * rotary_policy_names(void);

// A policy of the caller's own. `layer` is the model's layer number. Called by the thread that runs a graph.
typedef struct rotary_policy {
    void * user;
    // A routing, ids[n_tokens][n_used], and the router's weights, NULL if they are not known. Called before any of
    // these experts enters a slot.
    void (*note)(void * user, int32_t layer, const int32_t * ids, const float * weights, int32_t n_used,
                 int32_t n_tokens);
    void (*enter)(void * user, int32_t layer, int32_t expert, int32_t wanted); // wanted 0: prefetched, and not used yet
    void (*leave)(void * user, int32_t layer, int32_t expert);
    void (*resize)(void * user, int32_t layer, int32_t n_slots); // the layer has this many slots from now on
    // Return the victim among these resident experts, in the order of their slots; any other value means the first.
    int32_t (*choose)(void * user, int32_t layer, const int32_t * candidates, int32_t n);
} rotary_policy;

// ---- predictors ----------------------------------------------------------------------------------------------------

// A predictor names the experts that the next layers will want, to be prefetched. "router" applies the next layers'
// routers early; "auto" does the same, and uses the best predictor from routings for layers whose router cannot be
// applied. The names of the predictors from routings, comma separated, static:
const char * rotary_predictor_names(void);

// A predictor of the caller's own. Paged layers are numbered from 0. Called by the thread that runs a graph.
typedef struct rotary_predictor {
    void * user;
    // Called with each routing, ids[n_tokens][n_used].
    void (*note)(void * user, int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens);
    // Called after the routing of `layer`: write the experts that layer `ahead` will want for the last token, likeliest
    // first, into experts[n]; return how many.
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
    int32_t      repack;        // CPU inner device: 1 repacks experts into the CPU's layout where it has one (as stock
                                // llama.cpp loads weights), 0 keeps the plain layout (use_extra_bufts = false)
    int32_t      direct;        // 1 lets a host inner device compute from the mapping if a batch wants more experts
                                // than there are slots; 0 always pages them (in waves)
    const char * store;         // "auto", "mmap" or "direct"; NULL is "auto": direct if the experts do not fit into
                                // available memory
    int32_t      prefetch;      // 1 reads the experts that the next layers will probably want while the disk is idle
    int32_t      adaptive;      // 1 lets slots be rebalanced between layers, on a host inner device
    uint64_t     staging_bytes; // direct store: memory for reads in flight; 0 for the default
    const char * pin;           // "auto", "on" or "off": whether experts may be pinned in host memory for a GPU to
                                // read; NULL is "auto": if they take no more than 3/4 of available memory
    const char * policy;        // by name; NULL is "auto": the best one that can run where lookups are resolved
    const rotary_policy * own_policy; // instead of `policy`, or NULL; must outlive the pool
    const char * predictor;     // by name; NULL is "auto"
    const rotary_predictor * own_predictor; // instead of `predictor`, or NULL; must outlive the pool
} rotary_config;

typedef struct rotary_stats {
    // choices and sizes
    uint64_t budget_bytes;       // bytes that the budget text stands for
    uint64_t slot_bytes;         // bytes allocated for slots; layers on the mapped path have none
    uint64_t expert_bytes;       // bytes of all paged experts
    uint64_t min_budget_bytes;   // one token's experts in every layer
    uint64_t staging_bytes;      // memory for reads in flight, and waves' scratch
    uint64_t ram_bytes;          // direct store: slots in RAM in front of a GPU's slots
    uint64_t locked_bytes;       // pinned host memory: experts, or what they are copied through
    uint64_t resident_bytes;     // direct store: dense weights copied out of the page cache
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
    // From here on, counters since the pool was opened or rotary_pool_reset_counters(). A request is one token's use of one expert.
    uint64_t lookups;            // times a layer's routing was resolved
    uint64_t device_lookups;     // lookups resolved by the inner device: the host did not wait
    uint64_t requests;
    uint64_t hits;               // requests whose expert was resident, or a miss already counted in the same lookup
    uint64_t misses;             // distinct absent experts of each lookup
    uint64_t bypassed;           // misses computed from the mapping without a copy
    uint64_t evictions;
    uint64_t bytes_paged;
    uint64_t waves;              // passes beyond the first when a batch wanted more experts than slots
    uint64_t waits;              // times the host waited for the inner device to learn the routing
    uint64_t wait_us;
    uint64_t page_us;            // time spent moving experts into slots
    // direct store
    uint64_t reads;              // requests to the kernel; neighbours in the file are read as one
    uint64_t bytes_read;
    uint64_t ram_hits;           // misses of a GPU's slots that were found in slots in RAM
    uint64_t bytes_in_place;     // of bytes_read, read straight into slots
    uint64_t read_us;            // time with at least one read in flight
    uint64_t stall_us;           // time the computation waited for reads
    uint64_t shrinks;            // times slots were freed because memory ran short
    uint64_t slot_moves;         // slots moved from one layer to another
    // prefetch. accuracy = prefetch_used / prefetched; coverage = prefetch_used / misses;
    // timeliness = (prefetch_used - late_hits) / prefetch_used
    uint64_t predicted;          // experts predicted for a layer, resident ones included
    uint64_t predicted_right;    // predicted experts that the layer then chose
    uint64_t prefetched;         // experts whose read began before their layer's routing was known
    uint64_t prefetch_used;      // misses whose expert was prefetched or in flight
    uint64_t late_hits;          // of prefetch_used, still in flight
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

// Open a pool on `device`. Paged weights that llama.cpp then loads on the device belong to this pool, until it is
// closed or another is opened. While none is open, weights go to a pool configured by the environment: ROTARY_BUDGET,
// ROTARY_MARGIN, ROTARY_REPACK, ROTARY_DIRECT, ROTARY_STORE, ROTARY_STAGING, ROTARY_PIN, ROTARY_POLICY, ROTARY_PREFETCH
// (0, 1 or a predictor), ROTARY_SPLIT ("even" or "adaptive"). For every pool, ROTARY_RAM limits the tier in RAM,
// and ROTARY_IO=threads reads without io_uring. NULL on error.
rotary_pool * rotary_pool_open(int32_t device, const rotary_config * config);

// Close the pool to further weights and drop the caller's reference. Slots are freed once the model's buffers are too.
void rotary_pool_close(rotary_pool * pool);

// Resolve the budget and allocate the slots now instead of at the first graph. Call it after contexts are made: "auto"
// then sees what KV cache and compute buffers left. ROTARY_OK for a pool without paged weights.
int32_t rotary_pool_prepare(rotary_pool * pool);

// Change the budget. Slots are allocated anew, and start cold, at the next graph or rotary_pool_prepare().
int32_t rotary_pool_set_budget(rotary_pool * pool, const char * budget);

// Figures of the graphs that have ended and, where the host resolves lookups, of the one that runs. They may be read at
// any time, also by a policy, a predictor or a log callback; functions that change the pool return ROTARY_ERR_STATE
// there. `index` counts the paged layers from 0.
int32_t      rotary_pool_stats(rotary_pool * pool, rotary_stats * stats);
int32_t      rotary_pool_layer_stats(rotary_pool * pool, int32_t index, rotary_layer_stats * stats);
void         rotary_pool_reset_counters(rotary_pool * pool);

// Text of notice `index` (from 0), NULL past the end; valid while the pool is open.
const char * rotary_pool_notice(rotary_pool * pool, int32_t index);

// ---- budget: how a budget is divided into slots (pure logic, the code that sizes a pool) ----------------------------

typedef struct rotary_layer_size {
    uint64_t expert_bytes;  // one expert, all its tensors
    int32_t  n_expert;
    int32_t  n_expert_used; // per token: the minimum of slots
} rotary_layer_size;

// Divide `budget` (a text as in rotary_config) over n_layers layers; "auto" may take `free_bytes`. n_slots[n_layers]
// receives each layer's slots, `bytes` what the text stands for. ROTARY_ERR_ARG: not a budget, or "off";
// ROTARY_ERR_BUDGET: below one token's experts, whose size is then in `bytes`.
int32_t rotary_budget_divide(const char * budget, const rotary_layer_size * layers, int32_t n_layers,
                             uint64_t free_bytes, int32_t * n_slots, uint64_t * bytes);

// ---- profiles and traces of a pool ----------------------------------------------------------------------------------

// Each time slots are allocated, fill those of layer `il` with these distinct experts, most wanted first. Experts for
// which there is no slot are ignored. ROTARY_ERR_STATE while slots are allocated.
int32_t rotary_pool_warm(rotary_pool * pool, int32_t il, const int32_t * experts, int32_t n);

// What a profile says of layer `il`, for predictors that learn: popularity[n_expert], the share of n_tokens that chose
// each expert; pairs[n_expert][n_expert], for each expert of the paged layer before, the share of its uses where each
// expert of this layer was chosen, NULL for the first layer. ROTARY_ERR_STATE while slots are allocated.
int32_t rotary_pool_learn(rotary_pool * pool, int32_t il, const float * popularity, const float * pairs,
                          int32_t n_expert, int64_t n_tokens);

// Copy the name of the predictor in use into text[n]: "own" for the caller's, "" if nothing is predicted.
void rotary_pool_predictor(rotary_pool * pool, char * text, size_t n);

// The name of the eviction policy in use, "own" for the caller's, "" before slots are allocated. Static.
const char * rotary_pool_policy(rotary_pool * pool);

// Record routings from now on (1), or stop (0). Meanwhile the host resolves all lookups, even those a GPU could.
int32_t rotary_pool_trace(rotary_pool * pool, int32_t on);

// Take the recorded lookups into records[n]. Each has four numbers, the model's layer number, n_tokens, n_used and
// whether weights are known, then three arrays [n_tokens][n_used]: ids, the bits of the router's weights (floats), and
// whether the expert was resident (0 or 1). Returns how many numbers there are: if more than n, nothing is taken.
// n_untraced receives how many lookups were dropped since recording began, because they were not taken in time.
int64_t rotary_pool_trace_read(rotary_pool * pool, int32_t * records, int64_t n, uint64_t * n_untraced);

// ---- slot tables, caches and predictors without a model (pure logic, for tests and simulators) ---------------------

// One layer's slot table: which expert is in which slot.
typedef struct rotary_slots rotary_slots;

typedef struct rotary_load {
    int32_t expert;   // to be paged in
    int32_t slot;     // into this slot
    int32_t evicted;  // the expert that was there, -1 if the slot was free
} rotary_load;

// NULL if n_expert < 1, n_slots < 1 or n_slots > n_expert.
rotary_slots * rotary_slots_new(int32_t n_expert, int32_t n_slots);
void           rotary_slots_free(rotary_slots * slots);

// Make every expert in ids[n_ids] (repeats allowed) resident, evicting the least recently used of the others.
// slot_ids[n_ids] receives the slot of each id; `loads` needs room for n_slots entries. Returns the number of loads;
// ROTARY_ERR_ARG if an id is out of range or there are more distinct ids than slots (nothing is changed then).
int32_t rotary_slots_resolve(rotary_slots * slots, const int32_t * ids, int32_t n_ids, int32_t * slot_ids,
                             rotary_load * loads);

int32_t rotary_slots_slot_of(const rotary_slots * slots, int32_t expert); // -1 if absent
int32_t rotary_slots_expert_of(const rotary_slots * slots, int32_t slot); // -1 if free; a reserved slot's expert
int32_t rotary_slots_n_slots(const rotary_slots * slots);
int32_t rotary_slots_n_resident(const rotary_slots * slots);
void    rotary_slots_clear(rotary_slots * slots);

// Reserve a slot for an absent expert that is prefetched, evicting the least recently used expert not in keep[n_keep].
// The slot is held until the expert is resolved, as a load into that slot, or the reservation ends. Returns the slot;
// ROTARY_ERR_BUDGET if every slot is held; ROTARY_ERR_ARG if an id is out of range or the expert has a slot already.
int32_t rotary_slots_reserve(rotary_slots * slots, int32_t expert, const int32_t * keep, int32_t n_keep);

// End a reservation: the expert becomes `resident`, as the next victim, or the slot is free. ROTARY_ERR_ARG if none.
int32_t rotary_slots_end_reservation(rotary_slots * slots, int32_t expert, bool resident);

// Slot tables of all layers of a model, as a pool has them, for replaying traces.
typedef struct rotary_cache rotary_cache;

// `policy` is a name; `own`, if not NULL, is used instead. With `adaptive`, slots are rebalanced between layers, none
// of which falls below `min_slots`. NULL with this thread's error.
rotary_cache * rotary_cache_new(const char * policy, const rotary_policy * own, int32_t n_layers, int32_t n_expert,
                                const int32_t * n_slots, int32_t adaptive, int32_t min_slots);
void           rotary_cache_free(rotary_cache * cache);

// The table of one layer, owned by the cache. NULL if there is no such layer.
rotary_slots * rotary_cache_layer(rotary_cache * cache, int32_t layer);

// As rotary_slots_resolve(), for ids[n_tokens][n_used] and the router's weights, or NULL. ROTARY_ERR_ARG also
// if there is no such layer.
int32_t rotary_cache_resolve(rotary_cache * cache, int32_t layer, const int32_t * ids, const float * weights,
                             int32_t n_used, int32_t n_tokens, int32_t * slot_ids, rotary_load * loads);

// Resolve the rows of ids[n_rows][n_used] in order, each one token's routing of layers[row]; -1 ends a shorter row.
// misses[n_rows] receives the misses of each. ROTARY_ERR_ARG at the first row that cannot be resolved.
int32_t rotary_cache_replay(rotary_cache * cache, int64_t n_rows, const int32_t * layers, const int32_t * ids,
                            const float * weights, int32_t n_used, int32_t * misses);

// A predictor, for replaying traces; the functions are those of rotary_predictor. NULL with this thread's error.
typedef struct rotary_foresight rotary_foresight;

rotary_foresight * rotary_foresight_new(const char * predictor, const rotary_predictor * own, int32_t n_layers,
                                        int32_t n_expert);
void               rotary_foresight_free(rotary_foresight * foresight);
void               rotary_foresight_note(rotary_foresight * foresight, int32_t layer, const int32_t * ids, int32_t n_used,
                                         int32_t n_tokens);
// As rotary_pool_learn(); popularity_before is that of the paged layer before.
void               rotary_foresight_learn(rotary_foresight * foresight, int32_t layer, const float * popularity,
                                          const float * pairs, const float * popularity_before, int64_t n_tokens);
int32_t            rotary_foresight_name(rotary_foresight * foresight, int32_t layer, int32_t ahead, int32_t * experts,
                                         int32_t n);

// END API

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif // ROTARY_H
