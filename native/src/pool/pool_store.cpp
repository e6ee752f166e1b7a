// SPDX-License-Identifier: MIT
//
// Pool: where its experts' bytes come from. See pool.hpp.
//
// Experts lie in llama.cpp's mapping of the file, or, without mmap, in memory that it filled. Where they do not fit into
// the memory there is, the mapping would live on page faults, a few KiB at a time and the dense weights among them. The
// direct store reads them from the file instead, and the mapping is taken over: dense weights become ordinary memory,
// and nothing is left in the page cache that memory pressure could fight over.

#include "pool/pool.hpp"

#include "base/error.hpp"
#include "base/fork.hpp"
#include "base/memory.hpp"

#include "ggml-impl.h"
#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

namespace rotary {

// Experts of all pools, by where they begin: pools of several devices share one mapping. Never destroyed, as models may
// outlive our statics.
struct known_experts {
    size_t       bytes;
    std::string  path;  // of their file, if they are in one
    const void * owner; // the paged buffer
};

static auto & ranges_mutex = *new fork_mutex;
static auto & ranges       = *new std::map<const char *, known_experts>;

void register_experts(const paged_tensor & tensor) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    ranges[tensor.data] = { tensor.expert_bytes * tensor.ne[2], tensor.file ? tensor.file->path() : "", tensor.owner };
}

void forget_experts_of(const void * owner) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    for (auto each = ranges.begin(); each != ranges.end();) {
        each = each->second.owner == owner ? ranges.erase(each) : std::next(each);
    }
}

static std::vector<memory_range> all_experts(std::set<std::string> & paths) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    std::vector<memory_range>         found;
    for (const auto & [data, its] : ranges) {
        char * begin = const_cast<char *>(data);
        found.push_back({ begin, begin + its.bytes });
        paths.insert(its.path);
    }
    return found;
}

// ---- what the loader copies

// Known to all pools too: a pool of the environment begins with its first expert, and what one device takes concerns what
// another one's pool takes over.
static auto & copied_mutex    = *new fork_mutex;
static auto & copied_now      = *new std::set<std::string>;
static bool   copied_all_told = false; // experts have come: the next question is about another model

void note_weight(const std::string & name, bool copied) {
    const std::lock_guard<std::mutex> lock(copied_mutex);
    if (copied_all_told) {
        copied_now.clear();
        copied_all_told = false;
    }
    if (copied) {
        copied_now.insert(name);
    }
}

std::set<std::string> copied_by_loader() {
    const std::lock_guard<std::mutex> lock(copied_mutex);
    copied_all_told = true;
    return copied_now;
}

// Where the weights lie that llama.cpp has copied out of the mapping that `tensor` is in, to repack them or to a GPU.
std::vector<memory_range> pool::copied_weights(const paged_tensor & tensor) const {
    std::vector<memory_range>     found;
    const std::set<std::string> & copied = copied_.at(tensor.owner);
    if (copied.empty()) {
        return found;
    }
    const gguf_context_ptr header(gguf_init_from_file(tensor.file->path().c_str(), { true, nullptr }));
    char *                 base = const_cast<char *>(tensor.data) - tensor.offset;
    for (int64_t i = 0; header && i < gguf_get_n_tensors(header.get()); i++) {
        if (copied.count(gguf_get_tensor_name(header.get(), i)) != 0) {
            char * begin = base + gguf_get_data_offset(header.get()) + gguf_get_tensor_offset(header.get(), i);
            found.push_back({ begin, begin + gguf_get_tensor_size(header.get(), i) });
        }
    }
    return found;
}

// ---- choice

bool store_parse(const std::string & text, rotary_store & store) {
    store = text == "mmap" ? ROTARY_STORE_MMAP : text == "direct" ? ROTARY_STORE_DIRECT : ROTARY_STORE_AUTO;
    return store != ROTARY_STORE_AUTO || text == "auto";
}

void pool::choose_store() {
    uint64_t                      in_files = 0, in_memory = 0, file_bytes = 0;
    std::set<const weight_file *> files;
    const paged_tensor *          kept    = nullptr; // the first that lies in no file
    bool                          fresh   = false;   // some are in files and not read directly
    bool                          lost    = false;   // some are in files that cannot be opened again
    bool                          no_disk = true;    // all are in memory, or in files that are: a mapping takes no more
    for (const auto & tensor : tensors_) {
        const uint64_t bytes = tensor->expert_bytes * tensor->ne[2];
        if (tensor->file && files.insert(tensor->file.get()).second) {
            file_bytes += tensor->file->size();
            no_disk = no_disk && tensor->file->in_memory();
        }
        fresh = fresh || (tensor->file && !tensor->direct);
        lost  = lost || (tensor->is_mapped && !tensor->file);
        kept  = kept != nullptr || tensor->is_mapped ? kept : tensor.get();
        (tensor->is_mapped ? in_files : in_memory) += bytes;
    }
    const bool mapped = in_files > 0;
    if (!direct_) {
        const std::lock_guard<std::mutex> counters(counter_mutex_);
        totals_.store         = mapped ? ROTARY_STORE_MMAP : ROTARY_STORE_MEMORY;
        totals_.io            = ROTARY_IO_NONE;
        totals_.staging_bytes = 0;
    }
    if (config.store == ROTARY_STORE_MMAP) {
        return;
    }
    const host_memory memory = host_memory_now();
    const uint64_t    dense  = file_bytes > in_files && inner_is_host_ ? file_bytes - in_files : 0;
    const uint64_t    margin = inner_is_host_ ? margin_bytes(memory.total) : host_margin(memory.total);
    const uint64_t    wanted = in_files + dense + margin;
    const bool        fits   = no_disk || wanted <= memory.available;
    if (config.store == ROTARY_STORE_AUTO && !direct_ && (fits || !mapped)) {
        return;
    }
    if (!mapped || lost) {
        notice(format("%s: experts cannot be read from the file directly: %s", config.model.c_str(),
                      mapped ? no_direct_.c_str() : "they were loaded without mmap"));
    }
    const bool opens = !direct_;
    if ((lost && opens) || !mapped) {
        return;
    }
    if (fresh && !open_direct()) {
        notice(format("%s: experts are paged through the page cache, which is slow where they do not fit: %s",
                      config.model.c_str(), last_error()));
    }
    if (!direct_) {
        return;
    }
    if (kept != nullptr) {
        notice(
            format("%s: %s of experts lie in no file, such as %s: they stay in memory, and no budget limits that; the "
                   "others are read from the file directly",
                   config.model.c_str(), mib(in_memory).c_str(), kept->name.c_str()));
    }
    if (!opens) {
        return;
    }
    if (!fits) {
        GGML_LOG_INFO("rotary: %s: experts take %s, %s of memory are available: they are read from the file directly "
                      "(%s)\n",
                      config.model.c_str(), mib(in_files).c_str(), mib(memory.available).c_str(),
                      direct_->io() == ROTARY_IO_URING ? "io_uring" : "threads");
    }
    announce_io();
    if (!(*files.begin())->is_direct()) {
        notice(format("%s: its file system refuses direct reads; they go through the page cache",
                      (*files.begin())->path().c_str()));
    }
}

// Staging: what a layer's batch of reads needs to keep the disk busy while it is computed on, and no large part of the
// memory there is. It must hold the largest part of all, and better several.
static uint64_t staging_bytes(uint64_t wanted, uint64_t available, uint64_t least, uint64_t one_token, uint64_t all) {
    if (wanted == 0) {
        wanted = std::clamp<uint64_t>(available / 24, 16u << 20, 256u << 20);
        wanted = std::min(std::max(wanted, std::min(2 * one_token, available / 8)), all);
    }
    return std::max(wanted, least);
}

// Open the direct store, or open it to the models that came since. What fails leaves their mappings usable.
bool pool::open_direct() {
    uint64_t largest = 0, one_token = 0;
    for (const auto & tensor : tensors_) {
        largest = std::max<uint64_t>(largest, tensor->file ? tensor->expert_bytes : 0);
    }
    for (const auto & layer : layers_) {
        one_token = std::max(one_token, layer->expert_bytes * layer->n_expert_used);
    }
    const uint64_t                least = 3 * (largest + 2 * staging_area::unit);
    std::unique_ptr<direct_store> store;
    if (!direct_ || direct_->staging_bytes() < least) {
        store = std::make_unique<direct_store>(
            std::make_unique<reader>(),
            staging_bytes(config.staging_bytes, host_memory_now().available, least, one_token, totals_.expert_bytes),
            [this](const paged_tensor & tensor, int32_t expert) { return place_for(tensor, expert); });
        if (!store->ok()) {
            fail(ROTARY_ERR_MEMORY, format("%s: no memory for staging; lower it", config.model.c_str()));
            return false;
        }
    }

    // Take the mappings over, each owner's stretch of it once.
    std::map<const void *, std::vector<memory_range>> own;
    std::map<const void *, std::vector<memory_range>> copied;
    std::set<std::string>                             paths, with_experts;
    for (const auto & tensor : tensors_) {
        if (tensor->file && !tensor->direct) {
            if (own.count(tensor->owner) == 0) {
                copied[tensor->owner] = copied_weights(*tensor);
            }
            char * begin = const_cast<char *>(tensor->data);
            own[tensor->owner].push_back({ begin, begin + tensor->expert_bytes * tensor->ne[2] });
            paths.insert(tensor->file->path());
        }
    }
    const std::vector<memory_range> all = all_experts(with_experts);
    mapping_takeover                taken;
    for (const auto & [owner, ranges] : own) {
        std::vector<memory_range> others = all;
        others.insert(others.end(), copied[owner].begin(), copied[owner].end());
        if (!taken.add(ranges, others)) {
            return false;
        }
    }
    if (!taken.add_siblings(paths, with_experts)) {
        return false;
    }
    unlock_store();
    if (!taken.commit()) {
        return false;
    }
    if (store) {
        staging_lock_ = {};
        direct_       = std::move(store);
    }
    for (const auto & tensor : tensors_) {
        if (tensor->file && !tensor->direct) {
            tensor->direct = true;
            tensor->file->drop_cache();
        }
    }
    const std::lock_guard<std::mutex> counters(counter_mutex_);
    totals_.resident_bytes += taken.bytes();
    totals_.store         = ROTARY_STORE_DIRECT;
    totals_.io            = direct_->io();
    totals_.staging_bytes = direct_->staging_bytes();
    return true;
}

void pool::announce_io() {
    if (!direct_) {
        return;
    }
    for (const std::string & text : direct_->take_io_notices()) {
        notice(format("%s: %s", config.model.c_str(), text.c_str()));
    }
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.io = direct_->io();
}

// ---- bytes

const char * pool::fetch(const paged_tensor & tensor, int32_t expert) {
    if (!tensor.direct) {
        return tensor.expert_data(expert);
    }
    if (const char * there = at_hand(tensor, expert)) {
        return there;
    }
    const char *       bytes = direct_->wait(tensor, expert);
    const slot_table * ram   = by_data_.at(tensor.data).layer->ram.get();
    const int32_t      slot  = ram != nullptr && bytes != nullptr ? ram->slot_of(expert) : -1;
    if (slot >= 0 && bytes != tensor.landing_at(slot)) {
        // Read ahead into the staging area, before it had a slot.
        memcpy(tensor.landing_at(slot), bytes, tensor.expert_bytes);
        return tensor.landing_at(slot);
    }
    return bytes;
}

// Where an expert lies in RAM for good; NULL if it does not, or is still on its way there.
const char * pool::at_hand(const paged_tensor & tensor, int32_t expert) const {
    const slot_table * ram  = by_data_.at(tensor.data).layer->ram.get();
    const int32_t      slot = ram != nullptr ? ram->slot_of(expert) : -1;
    return slot >= 0 && !direct_->knows(tensor, expert) ? tensor.landing_at(slot) : nullptr;
}

bool pool::copy_out(const ggml_tensor * weight, void * data, size_t offset, size_t size) {
    const hold lock(*this);
    for (const auto & tensor : tensors_) {
        if (tensor->direct && tensor->data == weight->data) {
            return tensor->file->copy_out(tensor->offset + offset, data, size);
        }
    }
    memcpy(data, (const char *) weight->data + offset, size);
    return true;
}

bool pool::fetchable(const paged_tensor & tensor, int32_t expert) const {
    return !tensor.direct || direct_->landed(tensor, expert) || at_hand(tensor, expert) != nullptr;
}

void pool::release(const paged_tensor & tensor, int32_t expert) {
    if (tensor.direct) {
        direct_->take(tensor, expert);
    }
}

bool pool::files_unchanged() const {
    const weight_file * last = nullptr;
    for (const auto & tensor : tensors_) {
        if (tensor->file && tensor->file.get() != last) {
            last = tensor->file.get();
            if (!last->unchanged()) {
                return false;
            }
        }
    }
    return true;
}

} // namespace rotary
