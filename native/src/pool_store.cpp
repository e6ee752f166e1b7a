// SPDX-License-Identifier: MIT
//
// Pool: where its experts' bytes come from. See pool.hpp.
//
// Experts lie in llama.cpp's mapping of the file, or, without mmap, in memory that it filled. Where they do not fit into
// the memory there is, the mapping would live on page faults, a few KiB at a time and the dense weights among them. The
// direct store reads them from the file instead, and the mapping is taken over: dense weights become ordinary memory,
// and nothing is left in the page cache that memory pressure could fight over.

#include "pool.hpp"

#include "error.hpp"
#include "memory.hpp"

#include "ggml-impl.h"
#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

namespace rotary {

// Experts of all pools, by where they begin: pools of several devices share one mapping.
static std::mutex                     ranges_mutex;
static std::map<const char *, size_t> ranges;

void register_experts(const paged_tensor & tensor) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    ranges[tensor.data] = tensor.expert_bytes * tensor.ne[2];
}

void forget_experts(const paged_tensor & tensor) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    ranges.erase(tensor.data);
}

static std::vector<memory_range> all_experts() {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    std::vector<memory_range>         found;
    for (const auto & [data, size] : ranges) {
        char * begin = const_cast<char *>(data);
        found.push_back({ begin, begin + size });
    }
    return found;
}

void pool::note_copied(const std::string & weight) {
    const std::lock_guard<std::mutex> lock(mutex);
    copied_.insert(weight);
}

// Where the weights lie that llama.cpp has copied out of the mapping that `tensor` is in, to repack them or to a GPU.
std::vector<memory_range> pool::copied_weights(const paged_tensor & tensor) const {
    std::vector<memory_range> found;
    const gguf_context_ptr    header(gguf_init_from_file(tensor.file->path().c_str(), { true, nullptr }));
    char *                    base = const_cast<char *>(tensor.data) - tensor.offset;
    for (int64_t i = 0; header && i < gguf_get_n_tensors(header.get()); i++) {
        if (copied_.count(gguf_get_tensor_name(header.get(), i)) != 0) {
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
    if (direct_) {
        return; // the mapping is gone
    }
    const bool in_files = std::all_of(tensors_.begin(), tensors_.end(), [](const auto & each) { return each->file; });
    const bool mapped   = in_files || !no_direct_.empty();
    totals_.store       = mapped ? ROTARY_STORE_MMAP : ROTARY_STORE_MEMORY;
    if (config.store == ROTARY_STORE_MMAP) {
        return;
    }
    const uint64_t                expert_bytes = totals_.expert_bytes;
    uint64_t                      file_bytes   = 0;
    std::set<const weight_file *> files;
    for (const auto & tensor : tensors_) {
        if (tensor->file && files.insert(tensor->file.get()).second) {
            file_bytes += tensor->file->size();
        }
    }
    const host_memory memory = host_memory_now();
    const uint64_t    dense  = file_bytes > expert_bytes && inner_is_host_ ? file_bytes - expert_bytes : 0;
    const uint64_t    margin = inner_is_host_ ? margin_bytes(memory.total) : host_margin(memory.total);
    const uint64_t    wanted = expert_bytes + dense + margin;
    const bool        fits   = wanted <= memory.available;
    if (config.store == ROTARY_STORE_AUTO && (fits || !mapped)) {
        return;
    }
    if (!in_files) {
        notice(format("%s: experts cannot be read from the file directly: %s", config.model.c_str(),
                      mapped ? no_direct_.c_str() : "they were loaded without mmap"));
        return;
    }
    if (!open_direct()) {
        notice(format("%s: experts are paged through the page cache, which is slow where they do not fit: %s",
                      config.model.c_str(), last_error()));
        return;
    }
    if (!fits) {
        GGML_LOG_INFO("rotary: %s: experts take %s, %s of memory are available: they are read from the file directly "
                      "(%s)\n",
                      config.model.c_str(), mib(expert_bytes).c_str(), mib(memory.available).c_str(),
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
static uint64_t staging_bytes(uint64_t wanted, uint64_t available, uint64_t largest, uint64_t one_token, uint64_t all) {
    if (wanted == 0) {
        wanted = std::clamp<uint64_t>(available / 24, 16u << 20, 256u << 20);
        wanted = std::min(std::max(wanted, std::min(2 * one_token, available / 8)), all);
    }
    return std::max(wanted, 3 * (largest + 2 * staging_area::unit));
}

bool pool::open_direct() {
    // Take the mapping over, each owner's stretch of it once; what fails leaves the mapping usable.
    std::set<const void *> owners;
    uint64_t               largest = 0, one_token = 0;
    for (const auto & tensor : tensors_) {
        owners.insert(tensor->owner);
        largest = std::max<uint64_t>(largest, tensor->expert_bytes);
    }
    for (const auto & layer : layers_) {
        one_token = std::max(one_token, layer->expert_bytes * layer->n_expert_used);
    }
    auto store = std::make_unique<direct_store>(
        std::make_unique<reader>(),
        staging_bytes(config.staging_bytes, host_memory_now().available, largest, one_token, totals_.expert_bytes),
        [this](const paged_tensor & tensor, int32_t expert) { return place_for(tensor, expert); });
    if (!store->ok()) {
        fail(ROTARY_ERR_MEMORY, format("%s: no memory for staging; lower it", config.model.c_str()));
        return false;
    }
    const std::vector<memory_range> all = all_experts();
    for (const void * owner : owners) {
        if (std::find(detached_.begin(), detached_.end(), owner) != detached_.end()) {
            continue;
        }
        std::vector<memory_range> own, others = all;
        for (const auto & tensor : tensors_) {
            if (tensor->owner == owner) {
                if (own.empty() && !copied_.empty()) {
                    const std::vector<memory_range> copied = copied_weights(*tensor);
                    others.insert(others.end(), copied.begin(), copied.end());
                }
                char * begin = const_cast<char *>(tensor->data);
                own.push_back({ begin, begin + tensor->expert_bytes * tensor->ne[2] });
            }
        }
        const int64_t copied = detach_mapping(own, others);
        if (copied < 0) {
            return false;
        }
        totals_.resident_bytes += copied;
        detached_.push_back(owner);
    }
    std::set<std::string> paths;
    for (const auto & tensor : tensors_) {
        paths.insert(tensor->file->path());
    }
    const int64_t copied = detach_siblings(*paths.begin(), { paths.begin(), paths.end() });
    if (copied < 0) {
        return false;
    }
    totals_.resident_bytes += copied;
    for (const auto & tensor : tensors_) {
        tensor->file->drop_cache();
    }
    direct_               = std::move(store);
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
    if (!direct_) {
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
    const std::lock_guard<std::mutex> lock(mutex);
    if (direct_) {
        for (const auto & tensor : tensors_) {
            if (tensor->data == weight->data) {
                return tensor->file->copy_out(tensor->offset + offset, data, size);
            }
        }
    }
    memcpy(data, (const char *) weight->data + offset, size);
    return true;
}

bool pool::fetchable(const paged_tensor & tensor, int32_t expert) const {
    return !direct_ || direct_->landed(tensor, expert) || at_hand(tensor, expert) != nullptr;
}

void pool::release(const paged_tensor & tensor, int32_t expert) {
    if (direct_) {
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
