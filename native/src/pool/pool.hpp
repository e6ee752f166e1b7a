// SPDX-License-Identifier: MIT
//
// Pool: the paged experts of one model on one device. Knows where each expert's bytes are (the store, pool_store.cpp),
// which slots they are read straight into (pool_landing.cpp), which layers they form and how the budget is divided
// (pool.cpp), the inner device's memory for them (pool_slots.cpp) and what memory there is (pool_memory.cpp), how they
// get to a device with a link (pool_link.cpp), who foretells what layers want (pool_foresight.cpp), and what has happened
// (pool_figures.cpp). How a graph is run over them is executor.cpp.
//
// Threading: `mutex` is held, by a pool::hold, by whoever runs a graph over the pool or changes its layers or slots;
// `counter_mutex_` guards the counters and what rotary_pool_stats() shows, so that figures can be read while a graph runs.
// Nothing of the caller's is called with the latter held: policies, predictors and log callbacks may ask for figures.

#pragma once

#include "base/fork.hpp"
#include "cache/budget.hpp"
#include "cache/division.hpp"
#include "cache/rebalancer.hpp"
#include "cache/slot_table.hpp"
#include "link/link.hpp"
#include "link/staging_ring.hpp"
#include "prefetch/gain.hpp"
#include "prefetch/predictors/predictor.hpp"
#include "prefetch/router.hpp"
#include "rotary.h"
#include "store/direct_store.hpp"
#include "store/weight_file.hpp"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace rotary {

// One expert matrix of the model, [ne0, ne1, n_expert], in host memory: the mapping or a no-mmap copy.
struct paged_tensor {
    std::string   name;
    ggml_type     type;
    int64_t       ne[3];
    size_t        expert_bytes;        // bytes of one expert: nb[2]
    const char *  data;
    const void *  owner;               // the paged buffer it lies in
    bool          is_mapped;           // from a file by llama.cpp, not filled by it
    int32_t       n_expert_used;
    bool          leads = false;       // the first its layer uses: stands for the expert where experts are counted
    ggml_tensor * slots = nullptr;     // [ne0, ne1, n_slots] on the inner device; NULL on the mapped path

    std::shared_ptr<weight_file> file; // that `data` is mapped from, NULL if it is not
    uint64_t                     offset = 0;     // of the first expert in it
    bool                         direct = false; // read from there past the page cache: nothing is at `data`

    char * landing       = nullptr;              // slot 0 of the layer's `landing` table
    size_t landing_bytes = 0;                    // from one slot of it to the next

    const char * locked    = nullptr; // the same bytes in page-locked memory, here or elsewhere; NULL if there are none
    const char * on_device = nullptr; // those as the inner device reads them itself

    const char * expert_data(int32_t expert) const { return (locked ? locked : data) + expert_bytes * expert; }

    char * landing_at(int32_t slot) const { return landing + landing_bytes * slot; }

    // One slot as a tensor of its own: a repacking buffer takes whole tensors only.
    ggml_tensor slot(int32_t index) const {
        ggml_tensor one = *slots;
        one.ne[2]       = 1;
        one.nb[3]       = one.nb[2];
        one.data        = (char *) one.data + one.nb[2] * index;
        return one;
    }
};

// The tensors that share one routing: gate, up and down of a layer.
struct paged_layer {
    int32_t                     il    = -1;
    int32_t                     index = 0; // among the pool's
    int32_t                     n_expert;
    int32_t                     n_expert_used = 1;
    uint64_t                    expert_bytes  = 0; // one expert, all tensors
    std::vector<paged_tensor *> tensors;
    rotary_path                 path       = ROTARY_PATH_NONE;
    bool                        host_plain = false; // the inner device can compute from the store itself, exactly
    std::unique_ptr<slot_table> table;              // NULL unless path is SLOTS
    std::unique_ptr<slot_table> ram;                // of slots in RAM in front of the inner device's, if there are any
    slot_table *                landing     = nullptr; // which of the two the direct store reads straight into, if any
    int32_t                     n_allocated = 0;       // slots there is address space for; the table may use fewer
    rotary_layer_stats          stats       = {};

    paged_layer *               next = nullptr; // the layer that comes after this one in a graph
    router                      gate;           // for predicting this layer's experts; learnt from the first graph
    bool                        gate_sought = false;
    std::vector<guess>          foretold[experience::n_distances]; // for the next lookup, by layers ahead
    std::vector<paged_tensor *> order;                             // the tensors as the last graph used them

    // Lookups resolved by the inner device: pool_link.cpp.
    rotary_link_lookup      resolved  = {}; // all of it but the ids
    rotary_link_foretelling ahead     = {}; // of these: all of it but the state; no router until it is known
    int64_t                 most_embd = 0;  // elements of a state there is room for
    std::vector<float>      norm;           // [n_embd] weights of the norm before the router
    size_t                  table_at = 0; // offset of the layer's page table in that device's memory; 0 if it has none
    bool                    table_on_device = false; // the truth is there, not in `table`
    rotary_page_state       state           = {};    // what the device had counted when it was last asked

    // The rewritten ids, on the inner device: a fixed place for each layer, so that a captured graph stays valid.
    ggml_tensor *        slot_ids = nullptr;
    std::vector<int32_t> slot_ids_host; // the copy's source; must live until the inner backend has taken it
};

// "blk.12.ffn_up_exps.weight" -> 12; -1 if there is none.
int32_t layer_number(const std::string & name);

// Known to all pools, so that none takes another's experts for dense weights.
void register_experts(const paged_tensor & tensor);
void forget_experts_of(const void * owner);

// A dense weight of the model that is being loaded, and whether it is copied out of the mapping. The loader asks for all of
// them before any pool has an expert of the model, and for several devices in turn.
void                  note_weight(const std::string & name, bool copied);
std::set<std::string> copied_by_loader();

enum class pin_policy { automatic, on, off };               // whether experts may be page-locked in host memory

bool pin_parse(const std::string & text, pin_policy & pin); // "auto", "on", "off"

struct pool_config {
    budget                   wanted;
    std::string              budget_text   = "auto";
    std::string              model         = "model";
    uint64_t                 margin_bytes  = 0;
    bool                     repack        = true;
    bool                     direct        = true; // may compute a batch from the mapping
    rotary_store             store         = ROTARY_STORE_AUTO;
    bool                     prefetch      = true;
    std::string              predictor     = automatic_predictor; // of what the next layers want; or
    const rotary_predictor * own_predictor = nullptr;
    bool                     adaptive      = true;                // slots may move between layers
    uint64_t                 staging_bytes = 0;
    pin_policy               pin           = pin_policy::automatic;
    std::string              policy        = automatic_policy; // of eviction; or
    const rotary_policy *    own_policy    = nullptr;
};

bool store_parse(const std::string & text, rotary_store & store); // "auto", "mmap", "direct"

class pool : public std::enable_shared_from_this<pool> {
  public:
    pool(ggml_backend_dev_t inner, pool_config chosen);
    ~pool();

    class hold {
      public:
        explicit hold(pool & its) : its_(its), lock_(its.mutex) { its.holder_ = std::this_thread::get_id(); }
        ~hold() { its_.holder_ = std::thread::id(); }

      private:
        pool &                            its_;
        const std::lock_guard<std::mutex> lock_;
    };

    // ---- store: called by the paged buffers while llama.cpp loads
    void add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped);
    void remove_owner(const void * owner);

    // The store that reads past the page cache, NULL where experts are in memory or mapped.
    direct_store * direct() const { return direct_.get(); }

    // One expert's bytes in host memory, valid until release() of it or the next fetch(); NULL with this thread's error.
    const char * fetch(const paged_tensor & tensor, int32_t expert);
    bool         fetchable(const paged_tensor & tensor, int32_t expert) const; // without waiting
    void         release(const paged_tensor & tensor, int32_t expert);

    void announce_io(); // how the direct store reads, if that has changed

    // Make what has been read ahead into slots of a layer resident, and free what came in part only. What is still on
    // its way stays so; with `wait`, nothing is afterwards.
    void settle(paged_layer & layer, bool wait);

    // For each expert that is to be copied into the inner device's slots, where it is to be read to: a slot of the
    // layer's `landing` table, or one of these. What is in RAM counts as used there.
    static constexpr int32_t to_staging = -1, in_ram = -2;
    std::vector<int32_t>     landing_slots(paged_layer & layer, const std::vector<rotary_load> & loads);

    // A weight's bytes for somebody who does not compute with them; false with this thread's error.
    bool copy_out(const ggml_tensor * weight, void * data, size_t offset, size_t size);

    // Whether the files are still those that were loaded; else this thread's error says what happened.
    bool files_unchanged() const;

    // ---- sizing
    // Divide the budget and allocate the slots unless that is done. Call with `mutex` held.
    int32_t prepare();
    bool    forget_slots() noexcept; // after a failure: they may not hold what the tables say; false: not yet either
    bool    is_spoiled() const { return spoiled_; } // by a failure after which they could not be forgotten
    void    set_budget(const budget & wanted, const std::string & text);

    // What slots of a layer of the model begin with, the most wanted first. Call before they are allocated.
    int32_t warm(int32_t il, std::vector<int32_t> experts);

    // What a profile says of a layer of the model, for predictors that learn; as predictor::learn(). Call before that, too.
    int32_t learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens);

    // Give slots back when memory runs short, and take them again when there is plenty. Call between graphs.
    void follow_memory();

    // Move a slot between two layers if that is worth it. Call between graphs.
    void move_a_slot(ggml_backend_t inner);

    // Every routing that the host learns, for whoever learns from it.
    void note_use(const paged_layer & layer, const std::vector<int32_t> & ids, int64_t n_used);

    // What is foretold from: the next layers' routers, and routings where those cannot be had or others are asked for.
    bool                applies_routers() const;
    rotary::predictor * predictor() const { return predictor_.get(); } // from routings; NULL if there is none
    void                forget_guesses();
    void                no_router(const paged_layer & layer, const std::string & why); // that can be applied early
    std::string         predictor_name() const;

    // ---- for the executor, with `mutex` held and prepared
    struct place {
        paged_layer *  layer;
        paged_tensor * tensor;
    };
    // Where a weight with this data pointer belongs; layer NULL if it is not paged here.
    place find(const ggml_tensor * weight) const;

    // A tensor on the inner device that holds slot ids shaped like ids[n_expert_used, n_tokens]; NULL if no memory.
    ggml_tensor * slot_ids(paged_layer & layer, int64_t n_ids, int64_t n_tokens);

    // A backend that runs over the slots; true the first time, then it must be forgotten when it goes.
    bool use_from(ggml_backend_t backend);
    void forget(ggml_backend_t backend); // takes `mutex`
    bool is_shared() const { return users_.size() > 1; }

    // ---- on an inner device with a link; where a layer's table is decides who resolves its next lookup
    rotary::link * side() const { return link_.get(); }
    staging_ring * ring(); // NULL, with this thread's error, if it cannot be had
    bool           copies_by_link() const { return copies_by_link_; }
    // Whether bytes that fetch() gave of this tensor are page-locked: the link copies them as they lie.
    bool is_locked(const paged_tensor & tensor, const char * fetched) const;
    bool resolves_on_device(const paged_layer & layer, int64_t n_ids) const;
    void table_to_device(paged_layer & layer);
    bool table_to_host(paged_layer & layer);                               // waits; false with this thread's error
    bool set_scale(paged_layer & layer, const std::vector<float> & scale); // of `ahead`; false: no room
    bool send_states(); // what the device has counted, to the host; enqueues
    bool take_states(); // once they are there; false with this thread's error if a lookup was refused

    // ---- figures
    void count(paged_layer & layer, const rotary_layer_stats & delta);
    void count_wait(uint64_t us);
    void count_ram_hits(uint64_t n);
    void count_page(uint64_t us);
    void count_prefetch(const rotary_stats & delta);
    void count_reads(); // take over what the direct store has counted
    // Routings, as rotary_pool_trace_read() in rotary.h gives them.
    void         trace(bool on);
    bool         tracing() const { return tracing_; }
    void         record(const paged_layer & layer, const std::vector<int32_t> & ids, const std::vector<float> & weights,
                        int64_t n_used);
    int64_t      read_trace(int32_t * records, int64_t n, uint64_t & n_untraced);
    void         notice(const std::string & text); // said once: logged as a warning and kept for rotary_pool_notice
    void         stats(rotary_stats & out) const;
    bool         layer_stats(int32_t index, rotary_layer_stats & out) const;
    void         reset_counters();
    const char * notice_text(int32_t index) const;
    const char * policy_name() const { return chosen_policy_; } // "" before slots are allocated

    std::mutex mutex;
    // Whether this thread holds `mutex`: then it is in a policy, predictor or log callback, and must not want it again.
    bool held_here() const { return holder_ == std::this_thread::get_id(); }

    pool_config config; // the budget changes between graphs only
    bool        inner_is_host() const { return inner_is_host_; }
    // Activations of a wave: memory of the inner device for these tensors, the last wave's once more.
    bool     place_in_scratch(ggml_backend_t user, std::initializer_list<ggml_tensor *> tensors);
    uint64_t generation() const { return generation_; } // changes whenever slots or ids move

  private:
    int32_t              size();
    void                 forget_tables();
    void                 build_layers();
    int32_t              allocate(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated);
    std::vector<int32_t> with_room_to_move(const std::vector<int32_t> & n_allocated,
                                           const std::vector<int32_t> & n_slots) const;
    void                 choose_policy();
    int32_t              fill_slots(paged_layer & layer, const std::vector<rotary_load> & loads);
    int32_t              fill_at_first(paged_layer & layer);

    ggml_backend_buffer_t allocate_in_place(ggml_backend_buffer_type_t buft) const;

    void            release();
    uint64_t        free_bytes() const;
    uint64_t        margin_bytes(uint64_t total) const;
    static uint64_t host_margin(uint64_t total);
    static bool     reads_directly(const paged_layer & layer); // any of it
    static bool     reads_whole_sectors(const paged_layer & layer);
    const char *    at_hand(const paged_tensor & tensor, int32_t expert) const;
    char *          place_for(const paged_tensor & tensor, int32_t expert);
    void            choose_store();
    bool            open_direct();

    std::vector<memory_range> copied_weights(const paged_tensor & tensor) const;

    void resize(uint64_t bytes);
    void start_split();
    void free_slots();
    void choose_predictor();
    void make_predictor(const std::string & name);
    void drop_predictor();
    bool has_experts_on_device() const;
    void touch(const paged_layer & layer, int32_t first, int32_t last);
    void give_back(const paged_layer & layer, int32_t first, int32_t last);

    void open_link();
    void allocate_ram_tier();
    bool may_lock(uint64_t bytes, std::string & reason) const;
    bool lock_store(std::string & reason);
    void unlock_store();
    bool allocate_tables();
    bool take_over(paged_layer & layer, const rotary_page_state & state);

    std::vector<layer_size> layer_sizes() const;

    // Of this layer among layers_, which all share `history`.
    std::unique_ptr<slot_table> new_table(size_t layer, int32_t n_slots, const std::string & policy,
                                          const std::shared_ptr<routing_history> & history) const;
    void                        print_summary() const;

    ggml_backend_buffer_type_t slot_buft(const paged_tensor & tensor) const;

    std::atomic<std::thread::id> holder_{};

    ggml_backend_dev_t inner_;
    bool               inner_is_host_;

    std::vector<std::unique_ptr<paged_tensor>> tensors_;
    std::vector<std::unique_ptr<paged_layer>>  layers_;
    std::unordered_map<const void *, place>    by_data_;
    bool                                       prepared_ = false;
    bool                                       spoiled_  = false;
    int32_t                                    status_   = ROTARY_OK; // of the sizing, so that it is tried once
    std::string                                status_text_;
    std::unique_ptr<direct_store>              direct_;
    std::string                                no_direct_; // why a tensor's file could not be opened again

    std::map<const void *, std::set<std::string>>
        copied_; // by owner: dense weights that llama.cpp has copied elsewhere

    uint64_t                           memory_seen_us_  = 0;
    uint64_t                           growth_tried_us_ = 0;
    uint64_t                           most_slot_bytes_ = 0; // that slots may grow to
    slot_split                         split_;
    std::unique_ptr<rotary::predictor> predictor_;
    std::pair<size_t, int32_t>         predicted_;      // layers and experts that it was made for
    bool                               no_router_said_ = false;
    std::string                        predictor_name_; // guarded by counter_mutex_

    struct locked_range {
        char *       begin;
        char *       end;
        link::locked lock;
    };
    std::shared_ptr<rotary::link> link_;
    std::unique_ptr<staging_ring> ring_;         // NULL where everything that is copied is page-locked
    bool                          copies_by_link_ = false;
    link::locked                  staging_lock_; // of the direct store's
    std::vector<locked_range>     locked_;       // after the link: unlocked before it closes
    ggml_context_ptr              tables_context_;
    ggml_backend_buffer_ptr       tables_buffer_;
    ggml_tensor *                 tables_ = nullptr; // states of all layers, then page tables, as bytes
    std::shared_ptr<char>         ram_;              // slots in RAM
    std::atomic<size_t>           ram_bytes_{ 0 };   // read by whoever asks for the figures
    bool                          ram_locked_ = false;
    link::locked                  states_;           // the states as they last arrived
    size_t                        n_states_ = 0;     // layers that have a table there

    struct learnt {
        std::vector<float> popularity, pairs; // [n_expert], [n_expert][n_expert]
        int64_t            n_tokens;
    };
    std::map<int32_t, std::vector<int32_t>> warm_;   // by layer of the model
    std::map<int32_t, learnt>               learnt_; // the same; until there is a predictor

    std::vector<ggml_context_ptr>        contexts_;  // of the slot tensors, one for each buffer type
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<std::shared_ptr<void>>   known_;     // while the buffers live: host_memory_promised()
    ggml_context_ptr                     ids_context_;
    ggml_backend_buffer_ptr              ids_buffer_;
    int64_t                              ids_capacity_ = 0; // elements for each layer
    ggml_backend_buffer_ptr              scratch_;
    std::vector<ggml_backend_t>          users_;
    uint64_t                             generation_ = 0;

    mutable fork_mutex counter_mutex_;
    rotary_stats       totals_ = {}; // what layers do not count themselves
    std::atomic<bool>  tracing_{ false };

    std::atomic<const char *> chosen_policy_{ "" };

    std::vector<int32_t>    trace_;
    uint64_t                n_untraced_ = 0;
    std::deque<std::string> notices_; // a deque: the texts handed out must not move
    size_t                  scratch_bytes_ = 0;
    bool                    reset_direct_  = false;

    void leave_incomplete();

    bool                  locked_for_fork_ = false;
    bool                  incomplete_      = false; // a forked child's copy, made while a graph changed it
    std::shared_ptr<pool> self_;                    // of such a one, which is never destroyed
    fork_guard            guard_;                   // last
};

} // namespace rotary
