// SPDX-License-Identifier: MIT
//
// Expert store: gives the bytes of any expert of any tensor.
//
// Experts lie in llama.cpp's mapping of the file or, without mmap, in memory that llama.cpp filled. If they do not fit
// into available memory, the mapping would page-fault a few KiB at a time, for dense weights too. Then the direct store
// (direct_store.hpp) reads experts by direct I/O, and the mapping is taken over (weight_file.hpp): dense weights become
// ordinary memory, and nothing is left in the page cache for memory pressure to drop. In front of an inner device with
// memory of its own, experts that have been read stay in slots in RAM (ram_tier.hpp).
//
// store/ knows files, reads and memory, but neither graphs nor the inner device's slots: callers pass read targets.
// Called by link/ (which copies the bytes), model/ (sizing), prefetch/, pool/, exec/ and ggml/ (loaded weights).
// Threading: none of its own, the pool locks; reads go on in the background between calls.

#pragma once

#include "stats/notices.hpp"
#include "stats/statistics.hpp"
#include "store/direct_store.hpp"
#include "store/ram_tier.hpp"
#include "store/stored_tensor.hpp"

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace rotary {

bool store_parse(const std::string & text, rotary_store & store); // "auto", "mmap", "direct"

struct store_setting {
    std::string  model;             // name for messages
    rotary_store wanted        = ROTARY_STORE_AUTO;
    uint64_t     staging_bytes = 0; // 0: chosen from available memory
    bool         inner_is_host = true;
};

class expert_store {
  public:
    expert_store(store_setting setting, notices & notices, statistics & stats) :
        setting_(std::move(setting)), notices_(notices), stats_(stats) {}

    // While llama.cpp loads and frees models.
    void add(stored_tensor & tensor);
    void remove_owner(const void * owner);

    // Choose between mapping and direct I/O, and extend the direct store to models added since. `margin` bytes of
    // memory are to stay free; `one_token` is the bytes of one token's experts in the largest layer. `unpin` is called
    // before mappings are taken over and staging memory is replaced: no device may read either after that.
    void choose(uint64_t margin, uint64_t one_token, const std::function<void()> & unpin);

    direct_store * direct() const { return direct_.get(); } // NULL where experts are in memory or mapped
    ram_tier &     ram() { return ram_; }

    // The expert's bytes in host memory, valid until its release() or the next fetch(); NULL with this thread's error.
    const char * fetch(const stored_tensor & tensor, int32_t expert);
    bool         fetchable(const stored_tensor & tensor, int32_t expert) const; // fetch() would not wait
    void         release(const stored_tensor & tensor, int32_t expert);

    // Copy part of a weight, from wherever its bytes are; false with this thread's error.
    bool copy_out(const char * weight, void * data, size_t offset, size_t size) const;

    bool files_unchanged() const; // false with this thread's error
    void count_reads();           // copy the direct store's counters to the statistics
    void announce_io();           // add a notice if the direct store reads in another way now
    void clear();                 // drop all reads and all experts in RAM

  private:
    bool         open_direct(uint64_t one_token, const std::function<void()> & unpin);
    const char * in_ram(const stored_tensor & tensor, int32_t expert) const;

    store_setting                 setting_;
    notices &                     notices_;
    statistics &                  stats_;
    std::vector<stored_tensor *>  tensors_;
    std::string                   reopen_error_; // why a tensor's file could not be opened again
    std::unique_ptr<direct_store> direct_;
    ram_tier                      ram_;

    std::map<const void *, std::set<std::string>>
        copied_; // by owner: dense weights that llama.cpp has copied elsewhere
};

} // namespace rotary
