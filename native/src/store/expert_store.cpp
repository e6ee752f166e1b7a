// SPDX-License-Identifier: MIT
//
// Expert store. See expert_store.hpp.

#include "store/expert_store.hpp"

#include "base/error.hpp"
#include "base/memory.hpp"
#include "store/loaded_weights.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

namespace rotary {

// ---- loading

void expert_store::add(stored_tensor & tensor) {
    const stored_tensor * last = tensors_.empty() ? nullptr : tensors_.back();
    if (tensor.is_mapped && last != nullptr && last->owner == tensor.owner && last->file) {
        tensor.file   = last->file; // the same mapping, so no need to look it up again
        tensor.offset = last->offset + (tensor.data - last->data);
    } else if (tensor.is_mapped) {
        tensor.file = weight_file::at(tensor.data, tensor.offset, reopen_error_);
    }
    tensors_.push_back(&tensor);
    stats_.update([&](rotary_stats & totals) { totals.expert_bytes += tensor.bytes(); });
    register_experts(tensor);
    if (copied_.count(tensor.owner) == 0) {
        copied_[tensor.owner] = copied_by_loader();
    }
}

void expert_store::remove_owner(const void * owner) {
    const auto gone = std::stable_partition(tensors_.begin(), tensors_.end(),
                                            [owner](const auto * tensor) { return tensor->owner != owner; });
    forget_experts_of(owner);
    std::for_each(gone, tensors_.end(), [&](const auto * tensor) {
        stats_.update([&](rotary_stats & totals) { totals.expert_bytes -= tensor->bytes(); });
    });
    tensors_.erase(gone, tensors_.end());
    copied_.erase(owner);
    if (std::none_of(tensors_.begin(), tensors_.end(), [](const auto * tensor) { return tensor->direct_io; })) {
        direct_.reset();
    }
}

// ---- choice

bool store_parse(const std::string & text, rotary_store & store) {
    store = text == "mmap" ? ROTARY_STORE_MMAP : text == "direct" ? ROTARY_STORE_DIRECT : ROTARY_STORE_AUTO;
    return store != ROTARY_STORE_AUTO || text == "auto";
}

void expert_store::choose(uint64_t margin, uint64_t one_token, const std::function<void()> & unpin) {
    uint64_t                      in_files = 0, in_memory = 0, file_bytes = 0;
    std::set<const weight_file *> files;
    const stored_tensor *         kept    = nullptr; // the first tensor that lies in no file
    bool                          fresh   = false;   // some tensors are in files and not read directly yet
    bool                          lost    = false;   // some tensors' files cannot be opened again
    bool                          no_disk = true;    // no file is on a disk: mapping a tmpfs takes no more memory
    for (stored_tensor * tensor : tensors_) {
        const uint64_t bytes = tensor->bytes();
        if (tensor->file && files.insert(tensor->file.get()).second) {
            file_bytes += tensor->file->size();
            no_disk = no_disk && tensor->file->in_memory();
        }
        fresh = fresh || (tensor->file && !tensor->direct_io);
        lost  = lost || (tensor->is_mapped && !tensor->file);
        kept  = kept != nullptr || tensor->is_mapped ? kept : tensor;
        (tensor->is_mapped ? in_files : in_memory) += bytes;
    }
    const bool mapped = in_files > 0;
    if (!direct_) {
        stats_.update([&](rotary_stats & totals) {
            totals.store         = mapped ? ROTARY_STORE_MMAP : ROTARY_STORE_MEMORY;
            totals.io            = ROTARY_IO_NONE;
            totals.staging_bytes = 0;
        });
    }
    if (setting_.wanted == ROTARY_STORE_MMAP) {
        return;
    }
    const host_memory memory = host_memory_now();
    const uint64_t    dense  = file_bytes > in_files && setting_.inner_is_host ? file_bytes - in_files : 0;
    const uint64_t    wanted = in_files + dense + margin;
    const bool        fits   = no_disk || wanted <= memory.available;
    if (setting_.wanted == ROTARY_STORE_AUTO && !direct_ && (fits || !mapped)) {
        return;
    }
    if (!mapped || lost) {
        notices_.say(format("%s: experts cannot be read from the file directly: %s", setting_.model.c_str(),
                            mapped ? reopen_error_.c_str() : "they were loaded without mmap"));
    }
    const bool opens = !direct_;
    if ((lost && opens) || !mapped) {
        return;
    }
    if (fresh && !open_direct(one_token, unpin)) {
        notices_.say(format("%s: experts are paged through the page cache, which is slow where they do not fit: %s",
                            setting_.model.c_str(), last_error()));
    }
    if (!direct_) {
        return;
    }
    if (kept != nullptr) {
        notices_.say(
            format("%s: %s of experts lie in no file, such as %s: they stay in memory, and no budget limits that; the "
                   "others are read from the file directly",
                   setting_.model.c_str(), mib(in_memory).c_str(), kept->name.c_str()));
    }
    if (!opens) {
        return;
    }
    if (!fits) {
        GGML_LOG_INFO("rotary: %s: experts take %s, %s of memory are available: they are read from the file directly "
                      "(%s)\n",
                      setting_.model.c_str(), mib(in_files).c_str(), mib(memory.available).c_str(),
                      direct_->io() == ROTARY_IO_URING ? "io_uring" : "threads");
    }
    announce_io();
    if (!(*files.begin())->is_direct()) {
        notices_.say(format("%s: its file system refuses direct reads; they go through the page cache",
                            (*files.begin())->path().c_str()));
    }
}

// Staging memory: enough to keep the disk busy while a layer is computed, a small share of available memory, and never
// less than `min_bytes`, which holds a few of the largest parts.
static uint64_t staging_bytes(uint64_t wanted, uint64_t available, uint64_t min_bytes, uint64_t one_token,
                              uint64_t all) {
    if (wanted == 0) {
        wanted = std::clamp<uint64_t>(available / 24, 16u << 20, 256u << 20);
        wanted = std::min(std::max(wanted, std::min(2 * one_token, available / 8)), all);
    }
    return std::max(wanted, min_bytes);
}

// Open the direct store, or extend it to models that were loaded since. On failure their mappings stay usable.
bool expert_store::open_direct(uint64_t one_token, const std::function<void()> & unpin) {
    uint64_t largest = 0, all_bytes = 0;
    for (const stored_tensor * tensor : tensors_) {
        largest = std::max<uint64_t>(largest, tensor->file ? tensor->expert_bytes : 0);
        all_bytes += tensor->bytes();
    }
    const uint64_t                min_bytes = 3 * (largest + 2 * staging_area::unit);
    std::unique_ptr<direct_store> store;
    if (!direct_ || direct_->staging_bytes() < min_bytes) {
        store = std::make_unique<direct_store>(
            std::make_unique<reader>(),
            staging_bytes(setting_.staging_bytes, host_memory_now().available, min_bytes, one_token, all_bytes));
        if (!store->ok()) {
            fail(ROTARY_ERR_MEMORY, format("%s: no memory for staging; lower it", setting_.model.c_str()));
            return false;
        }
    }

    // Take the mappings over, all experts of one owner at once.
    std::map<const void *, std::vector<memory_range>> own;
    std::map<const void *, std::vector<memory_range>> copied;
    std::set<std::string>                             paths, with_experts;
    for (stored_tensor * tensor : tensors_) {
        if (tensor->file && !tensor->direct_io) {
            if (own.count(tensor->owner) == 0) {
                copied[tensor->owner] = ranges_of(copied_.at(tensor->owner), *tensor);
            }
            char * begin = const_cast<char *>(tensor->data);
            own[tensor->owner].push_back({ begin, begin + tensor->bytes() });
            paths.insert(tensor->file->path());
        }
    }
    const std::vector<memory_range> everybodys = all_experts(with_experts);
    mapping_takeover                taken;
    for (const auto & [owner, ranges] : own) {
        std::vector<memory_range> others = everybodys;
        others.insert(others.end(), copied[owner].begin(), copied[owner].end());
        if (!taken.add(ranges, others)) {
            return false;
        }
    }
    if (!taken.add_siblings(paths, with_experts)) {
        return false;
    }
    unpin();
    if (!taken.commit()) {
        return false;
    }
    if (store) {
        direct_ = std::move(store);
    }
    for (stored_tensor * tensor : tensors_) {
        if (tensor->file && !tensor->direct_io) {
            tensor->direct_io = true;
            tensor->file->drop_cache();
        }
    }
    stats_.update([&](rotary_stats & totals) {
        totals.resident_bytes += taken.bytes();
        totals.store         = ROTARY_STORE_DIRECT;
        totals.io            = direct_->io();
        totals.staging_bytes = direct_->staging_bytes();
    });
    return true;
}

void expert_store::announce_io() {
    if (!direct_) {
        return;
    }
    for (const std::string & text : direct_->take_io_notices()) {
        notices_.say(format("%s: %s", setting_.model.c_str(), text.c_str()));
    }
    stats_.update([&](rotary_stats & totals) { totals.io = direct_->io(); });
}

void expert_store::count_reads() {
    if (!direct_) {
        return;
    }
    if (stats_.take_reset()) {
        direct_->reset_counters();
    }
    const direct_store::counters & counted = direct_->counted();
    stats_.update([&](rotary_stats & totals) {
        totals.reads          = counted.reads;
        totals.bytes_read     = counted.bytes_read;
        totals.bytes_in_place = counted.bytes_in_place;
        totals.read_us        = counted.read_us;
        totals.stall_us       = counted.stall_us;
        totals.prefetched     = counted.prefetched;
    });
}

void expert_store::clear() {
    if (direct_) {
        direct_->clear();
    }
    ram_.clear();
}

// ---- bytes

const char * expert_store::fetch(const stored_tensor & tensor, int32_t expert) {
    if (!tensor.direct_io) {
        return tensor.at(expert);
    }
    if (const char * there = in_ram(tensor, expert)) {
        return there;
    }
    const char * bytes = direct_->wait(tensor, expert);
    char *       slot  = bytes != nullptr ? ram_.slot_of(tensor, expert) : nullptr;
    if (slot != nullptr && bytes != slot) { // prefetched into the staging area, before it had a slot in RAM
        memcpy(slot, bytes, tensor.expert_bytes);
        return slot;
    }
    return bytes;
}

// The expert's bytes in the RAM tier; NULL if it has no slot there or the direct store is not done with it.
const char * expert_store::in_ram(const stored_tensor & tensor, int32_t expert) const {
    const char * slot = ram_.slot_of(tensor, expert);
    return slot != nullptr && !direct_->knows(tensor, expert) ? slot : nullptr;
}

bool expert_store::fetchable(const stored_tensor & tensor, int32_t expert) const {
    return !tensor.direct_io || direct_->landed(tensor, expert) || in_ram(tensor, expert) != nullptr;
}

void expert_store::release(const stored_tensor & tensor, int32_t expert) {
    if (tensor.direct_io) {
        direct_->take(tensor, expert);
    }
}

bool expert_store::copy_out(const char * weight, void * data, size_t offset, size_t size) const {
    for (const stored_tensor * tensor : tensors_) {
        if (tensor->direct_io && tensor->data == weight) {
            return tensor->file->copy_out(tensor->offset + offset, data, size);
        }
    }
    memcpy(data, weight + offset, size);
    return true;
}

bool expert_store::files_unchanged() const {
    const weight_file * last = nullptr;
    for (const stored_tensor * tensor : tensors_) {
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
