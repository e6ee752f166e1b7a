// SPDX-License-Identifier: MIT
//
// Pool: the paged experts of one model on one device. It owns the parts and their lifetimes, and does none of the work.
//
// pool/ is what ggml/ and capi/ hold by a shared pointer, and what exec/ runs graphs over.
// Threading: `lock` must be held to run a graph over the pool or to change its layers or slots; each section below says
// who takes it. Figures have locks of their own (stats/statistics.hpp) and can be read at any time.

#pragma once

#include "model/memory_governor.hpp"
#include "model/paged_model.hpp"
#include "model/sizing.hpp"
#include "pool/pool_lock.hpp"
#include "prefetch/predictions.hpp"

#include "ggml-backend.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rotary {

struct pool_config {
    model_config    model;
    prefetch_config prefetch;
};

class pool : public std::enable_shared_from_this<pool> {
  public:
    pool(ggml_backend_dev_t inner, const pool_config & config);
    ~pool();

    // ---- for the paged buffers, while llama.cpp loads; take the lock
    void add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped);
    void remove_owner(const void * owner);
    bool copy_out(const ggml_tensor * weight, void * data, size_t offset,
                  size_t size); // false with this thread's error

    // ---- for the C API and the executor, with the lock held
    void    count_lost_models(int n) { n_lost_models_ += n; } // not all experts are known: no memory; needs no lock
    int32_t prepare(); // choose the store, divide the budget and allocate slots, unless that is done
    void    set_budget(const budget & wanted, const std::string & text);
    int32_t warm(int32_t il, std::vector<int32_t> experts); // first_fill::set(), before slots are allocated
    int32_t learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens);
    void    trace(bool on);

    // ---- for the executor, with the lock held
    // Before a graph: follow memory pressure and rebalance. False if slots of a failed graph cannot be forgotten yet.
    bool begin_graph(ggml_backend_t user);
    bool forget_slots() noexcept; // after a failure: slots may not hold what the tables say; false: try again

    // Register a backend that runs over the slots; true if it is new, and must be removed when it goes.
    bool add_user(ggml_backend_t user);
    void remove_user(ggml_backend_t user); // takes the lock
    bool is_shared() const { return users_.size() > 1; }

    // ---- figures, at any time
    rotary_stats stats() const;
    const char * policy_name() const { return sizing_.policy(); }

    paged_model model;
    predictions predicted;

  private:
    void    release();
    int32_t fail_already_sized() const;

    sizing                      sizing_;
    memory_governor             governor_;
    std::vector<ggml_backend_t> users_;
    std::atomic<int>            n_lost_models_{ 0 };
    bool                        slots_invalid_ = false; // a failure left slots that could not be forgotten
    std::shared_ptr<pool>       self_;                  // keeps a pool alive that a child cannot use

  public:
    pool_lock lock; // last member, so destroyed first
};

} // namespace rotary
