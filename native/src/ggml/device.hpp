// SPDX-License-Identifier: MIT
//
// ROTARY devices: one over each inner device, registered in this process's ggml.
//
// ggml/ is what llama.cpp sees: the entry point (registry.cpp) and what the environment says (environment.cpp), devices
// (here and device_iface.cpp), the buffer type of expert weights (paged_buffer.cpp) and the backend that computes
// (backend.cpp). Everything but expert lookup is handed to the inner device. Called by ggml and llama.cpp, and by
// capi/, which opens and closes pools.
// Threading: as in ggml: devices from any thread, a backend from one at a time. A device's mutex guards which pool
// collects and what the loader was told; no pool's lock is taken while it is held.

#pragma once

#include "pool/pool.hpp"

#include "ggml-backend-impl.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace rotary {

class device {
  public:
    device(ggml_backend_reg_t reg, int index, ggml_backend_dev_t inner, const std::string & inner_name,
           const pool_config & environment);

    ggml_backend_dev_t         handle() { return &handle_; }
    ggml_backend_buffer_type_t paged_buft() { return &paged_buft_; }
    ggml_backend_dev_t         inner() const { return inner_; }
    const std::string &        name() const { return name_; }
    const std::string &        paged_name() const { return paged_name_; }
    const std::string &        inner_name() const { return inner_name_; }
    const std::string &        description() const { return description_; }

    // The buffer types that llama.cpp tries after the default one, the paged one first; NULL-terminated.
    ggml_backend_buffer_type_t * extra_bufts() { return extra_bufts_.data(); }

    bool set_inner(ggml_backend_dev_t inner, const std::string & name); // false while in use

    // The pool that collects the weights loaded now: the last one opened by the C API, else one from the environment.
    std::shared_ptr<pool> open_pool(const pool_config & config);
    std::shared_ptr<pool> collecting_pool();
    void                  stop_collecting(const pool * pool);
    uint64_t              slot_bytes() const; // of the opened pool and the environment's

    // For answering the loader's questions about weights that no pool has yet.
    bool    paging() const;                                              // false: budget "off"
    bool    repack() const;
    void    remember_n_expert_used(const std::string & name, int32_t n); // from the loader's question
    int32_t n_expert_used(const std::string & name) const;

    // Memory ran out while the loader asked, so the pool opened for this model may miss experts and must refuse to run.
    void count_lost_model() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (opened_) {
            opened_->count_lost_models(1);
        }
    }

    // Count the backends and paged buffers alive on this device.
    void add_user(int n) {
        const std::lock_guard<std::mutex> lock(mutex_);
        n_users_ += n;
    }

  private:
    void wrap(ggml_backend_dev_t inner, const std::string & name);

    ggml_backend_device      handle_;
    ggml_backend_device      paged_device_; // never registered; makes llama.cpp map weights instead of copying them
    ggml_backend_buffer_type paged_buft_;
    std::string              name_;
    std::string              paged_name_;
    ggml_backend_dev_t       inner_;
    std::string              inner_name_;
    std::string              description_;

    std::vector<ggml_backend_buffer_type_t> extra_bufts_;

    mutable fork_mutex             mutex_;
    std::shared_ptr<pool>          opened_; // by rotary_pool_open
    std::weak_ptr<pool>            from_environment_;
    pool_config                    environment_;
    int                            n_users_ = 0;
    std::map<std::string, int32_t> n_expert_used_;
};

// Every ROTARY device of this process; empty until the library is registered.
std::vector<std::unique_ptr<device>> & devices();

// device_at() is NULL with this thread's error if there is no such device.
bool     is_device(int32_t index);
device * device_at(int32_t index);

bool is_rotary(ggml_backend_dev_t dev);

// Vtables, each in the file that implements it.
extern const ggml_backend_device_i      device_i;       // device_iface.cpp
extern const ggml_backend_device_i      paged_device_i; // paged_buffer.cpp
extern const ggml_backend_buffer_type_i paged_buft_i;   // paged_buffer.cpp

// Read a pool's configuration from ROTARY_* variables; false with this thread's error if one is not understood.
bool read_environment(pool_config & config);         // environment.cpp

ggml_backend_t backend_new(device & dev);            // backend.cpp
ggml_backend_t backend_inner(ggml_backend_t handle); // backend.cpp

// The pool of a weight that lies in a ROTARY_PAGED buffer, else NULL.
std::shared_ptr<pool> paged_pool_of(const ggml_tensor * weight); // paged_buffer.cpp

} // namespace rotary
