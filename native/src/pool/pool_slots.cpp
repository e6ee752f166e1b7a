// SPDX-License-Identifier: MIT
//
// Pool: memory on the inner device, for slots, rewritten ids and the waves' activations. See pool.hpp.

#include "base/error.hpp"
#include "base/inner_device.hpp"
#include "base/memory.hpp"
#include "pool/pool.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <map>

namespace rotary {

// ---- slots

int32_t pool::allocate(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated) {
    contexts_.clear();
    free_slots();
    generation_++;
    choose_policy();

    std::map<ggml_backend_buffer_type_t, ggml_context *> by_buft;
    uint64_t                                             slot_bytes = 0;
    bool                                                 repacked   = false;
    const auto                                           history    = routing_history_new((int32_t) layers_.size());
    std::unique_lock<std::mutex>                         lock(counter_mutex_);
    for (size_t i = 0; i < layers_.size(); i++) {
        paged_layer & layer = *layers_[i];
        const bool    all   = n_slots[i] == layer.n_expert;
        bool          plain = inner_is_host_;
        for (const paged_tensor * tensor : layer.tensors) {
            plain = plain && slot_buft(*tensor) == ggml_backend_dev_buffer_type(inner_);
        }
        layer.host_plain    = plain && !reads_directly(layer);
        layer.path          = !all ? ROTARY_PATH_SLOTS : layer.host_plain ? ROTARY_PATH_MAPPED : ROTARY_PATH_RESIDENT;
        layer.table         = all ? nullptr : new_table(i, n_slots[i], policy_name(), history);
        layer.n_allocated   = n_allocated[i];
        const bool in_place = plain && reads_whole_sectors(layer);
        layer.landing       = in_place ? layer.table.get() : nullptr;
        layer.ram.reset();
        layer.stats            = {};
        layer.stats.n_slots    = n_slots[i];
        layer.stats.n_resident = all ? layer.n_expert : 0;
        repacked               = repacked || (inner_is_host_ && !plain);
        for (paged_tensor * tensor : layer.tensors) {
            tensor->slots = nullptr;
            if (layer.path == ROTARY_PATH_MAPPED) {
                continue;
            }
            ggml_context *& ctx = by_buft[slot_buft(*tensor)];
            if (ctx == nullptr) {
                contexts_.emplace_back(ggml_init({ ggml_tensor_overhead() * tensors_.size(), nullptr, true }));
                ctx = contexts_.back().get();
            }
            tensor->slots = ggml_new_tensor_3d(ctx, tensor->type, tensor->ne[0], tensor->ne[1], n_allocated[i]);
            ggml_format_name(tensor->slots, "%s (slots)", tensor->name.c_str());
            if (in_place && tensor->direct && tensor->offset % tensor->file->alignment() != 0) {
                // The first and the last sector of an expert hold bytes of its neighbours in the file.
                tensor->slots->nb[2] += tensor->file->alignment();
                tensor->slots->nb[3] = tensor->slots->nb[2] * n_allocated[i];
            }
            slot_bytes += tensor->expert_bytes * n_slots[i];
        }
    }
    totals_.repacked = repacked;
    lock.unlock();
    if (inner_is_host_ && slot_bytes > host_memory_now().available) {
        return fail(ROTARY_ERR_MEMORY,
                    format("%s: no memory for %s of slots, %s are available; lower the budget", config.model.c_str(),
                           mib(slot_bytes).c_str(), mib(host_memory_now().available).c_str()));
    }
    for (const auto & [buft, ctx] : by_buft) {
        ggml_backend_buffer_t buffer = direct_ && buft == ggml_backend_dev_buffer_type(inner_) && inner_is_host_
                                           ? allocate_in_place(buft)
                                           : ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (buffer == nullptr) {
            free_slots();
            return fail(ROTARY_ERR_MEMORY,
                        format("%s: no memory for %s of slots on %s; lower the budget", config.model.c_str(),
                               mib(slot_bytes).c_str(), ggml_backend_dev_name(inner_)));
        }
        buffers_.emplace_back(buffer);
        if (inner_is_host_) {
            char * base = (char *) ggml_backend_buffer_get_base(buffer);
            known_.push_back(host_memory_of_slots({ base, base + ggml_backend_buffer_get_size(buffer) }));
        } else {
            // A GPU kernel may read past an expert's end into the next slot and multiply by zero: no NaN may be there.
            ggml_backend_buffer_clear(buffer, 0);
        }
    }
    for (const auto & layer : layers_) {
        if (layer->path == ROTARY_PATH_SLOTS && inner_is_host_) {
            touch(*layer, 0, layer->stats.n_slots);
        }
        if (fill_at_first(*layer) != ROTARY_OK) {
            return last_status();
        }
        const std::lock_guard<std::mutex> counters(counter_mutex_);
        layer->stats.n_resident = layer->table ? layer->table->n_resident() : layer->n_expert;
    }
    allocate_ram_tier();
    if (!allocate_tables()) {
        return fail(ROTARY_ERR_MEMORY, format("%s: no memory for page tables on %s; lower the budget",
                                              config.model.c_str(), ggml_backend_dev_name(inner_)));
    }
    start_split();
    choose_predictor();
    lock.lock();
    totals_.slot_bytes = slot_bytes;
    return ROTARY_OK;
}

void pool::free_slots() {
    known_.clear();
    buffers_.clear();
}

// Of names that stay: figures are read while a graph runs.
void pool::choose_policy() {
    const bool automatic = config.policy == automatic_policy;
    chosen_policy_       = config.own_policy != nullptr ? "own"
                           : !automatic                 ? policy_name_of(config.policy)
                           : has_experts_on_device()    ? best_on_device
                                                        : best_policy;
}

std::unique_ptr<slot_table> pool::new_table(size_t layer, int32_t n_slots, const std::string & policy,
                                            const std::shared_ptr<routing_history> & history) const {
    const int32_t n_expert = layers_[layer]->n_expert;
    return std::make_unique<slot_table>(
        n_expert, n_slots,
        policy_new(policy, { n_expert, n_slots, (int32_t) layer, layers_[layer]->il, history, config.own_policy }));
}

// Slots at their parts' offset in the file modulo its alignment, with room for a sector around each tensor's slots.
ggml_backend_buffer_t pool::allocate_in_place(ggml_backend_buffer_type_t buft) const {
    std::vector<paged_tensor *> placed;
    size_t                      size     = 0;
    const auto                  align_of = [&](const paged_tensor * tensor) {
        return std::max(tensor->direct ? tensor->file->alignment() : 1, ggml_backend_buft_get_alignment(buft));
    };
    for (const auto & tensor : tensors_) {
        if (tensor->slots != nullptr && slot_buft(*tensor) == buft) {
            placed.push_back(tensor.get());
            size += tensor->slots->nb[3] + 3 * align_of(tensor.get());
        }
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, size);
    if (buffer != nullptr) {
        auto at = (uintptr_t) ggml_backend_buffer_get_base(buffer);
        for (paged_tensor * tensor : placed) {
            const size_t align = align_of(tensor);
            at                 = (at + align - 1) / align * align;
            at += tensor->direct ? tensor->offset % tensor->file->alignment() : 0;
            ggml_backend_tensor_alloc(buffer, tensor->slots, (void *) at);
            tensor->landing       = (char *) at;
            tensor->landing_bytes = tensor->slots->nb[2];
            at += tensor->slots->nb[3] + align;
        }
    }
    return buffer;
}

int32_t pool::fill_slots(paged_layer & layer, const std::vector<rotary_load> & loads) {
    for (paged_tensor * tensor : layer.tensors) {
        for (size_t i = 0; tensor->direct && i < loads.size(); i++) {
            direct_->demand(*tensor, loads[i].expert);
        }
    }
    for (paged_tensor * tensor : layer.tensors) {
        for (const rotary_load & load : loads) {
            const char * bytes = fetch(*tensor, load.expert);
            if (bytes == nullptr) {
                return last_status();
            }
            ggml_tensor slot = tensor->slot(load.slot);
            ggml_backend_tensor_set(&slot, bytes, 0, tensor->expert_bytes);
            release(*tensor, load.expert);
        }
    }
    return ROTARY_OK;
}

// Every expert into its slot, where all have one; else what the profile says.
int32_t pool::fill_at_first(paged_layer & layer) {
    std::vector<rotary_load> loads;
    if (layer.path == ROTARY_PATH_RESIDENT) {
        for (int32_t expert = 0; expert < layer.n_expert; expert++) {
            loads.push_back({ expert, expert, -1 });
        }
    } else if (layer.path == ROTARY_PATH_SLOTS && warm_.count(layer.il) != 0) {
        std::vector<int32_t> experts = warm_[layer.il];
        experts.resize(std::min(experts.size(), (size_t) layer.table->n_slots()));
        const auto n = (int32_t) experts.size();
        // As if each had been used once, the most wanted last.
        for (auto expert = experts.rbegin(); expert != experts.rend(); expert++) {
            layer.table->note(&*expert, nullptr, 1, 1);
        }
        std::vector<int32_t> slots(n);
        loads.resize(n);
        layer.table->place(experts.data(), n, slots.data(), loads.data());
    }
    return fill_slots(layer, loads);
}

int32_t pool::warm(int32_t il, std::vector<int32_t> experts) {
    const bool known = std::all_of(tensors_.begin(), tensors_.end(), [&](const auto & tensor) {
        return layer_number(tensor->name) != il || std::all_of(experts.begin(), experts.end(), [&](int32_t expert) {
                   return expert >= 0 && expert < tensor->ne[2];
               });
    });
    if (prepared_) {
        return fail(ROTARY_ERR_STATE, format("%s: its slots are allocated; begin with another profile before that",
                                             config.model.c_str()));
    }
    if (!known || std::set<int32_t>(experts.begin(), experts.end()).size() != experts.size()) {
        return fail(ROTARY_ERR_ARG, format("%s: layer %d has no such experts, or not so often; make the profile anew",
                                           config.model.c_str(), il));
    }
    warm_[il] = std::move(experts);
    return ROTARY_OK;
}

// ---- ids and activations

ggml_tensor * pool::slot_ids(paged_layer & layer, int64_t n_ids, int64_t n_tokens) {
    if (n_ids * n_tokens > ids_capacity_) {
        const int64_t capacity = GGML_PAD(n_ids * n_tokens, 1024);
        generation_++;
        ids_buffer_.reset();
        ids_context_.reset(ggml_init({ ggml_tensor_overhead() * layers_.size(), nullptr, true }));
        for (const auto & each : layers_) {
            each->slot_ids = ggml_new_tensor_2d(ids_context_.get(), GGML_TYPE_I32, capacity, 1);
        }
        ids_buffer_.reset(
            ggml_backend_alloc_ctx_tensors_from_buft(ids_context_.get(), ggml_backend_dev_buffer_type(inner_)));
        ids_capacity_ = ids_buffer_ ? capacity : 0;
        if (!ids_buffer_) {
            return nullptr;
        }
    }
    ggml_tensor * ids = layer.slot_ids;
    ids->ne[0]        = n_ids;
    ids->ne[1]        = n_tokens;
    ids->nb[1]        = n_ids * sizeof(int32_t);
    ids->nb[2] = ids->nb[3] = ids->nb[1] * n_tokens;
    return ids;
}

bool pool::place_in_scratch(ggml_backend_t user, std::initializer_list<ggml_tensor *> tensors) {
    ggml_backend_buffer_type_t buft  = ggml_backend_dev_buffer_type(inner_);
    const size_t               align = ggml_backend_buft_get_alignment(buft);
    size_t                     bytes = align;
    for (const ggml_tensor * each : tensors) {
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, each), align);
    }
    if (!scratch_ || ggml_backend_buffer_get_size(scratch_.get()) < bytes) {
        ggml_backend_synchronize(user); // its last wave may be in there
        scratch_.reset();
        scratch_.reset(ggml_backend_buft_alloc_buffer(buft, bytes));
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        scratch_bytes_ = scratch_ ? bytes : 0;
    }
    if (!scratch_) {
        return false;
    }
    auto at = (uintptr_t) ggml_backend_buffer_get_base(scratch_.get());
    for (ggml_tensor * each : tensors) {
        at = (at + align - 1) / align * align;
        if (ggml_backend_tensor_alloc(scratch_.get(), each, (void *) at) != GGML_STATUS_SUCCESS) {
            return false;
        }
        at += ggml_backend_buft_get_alloc_size(buft, each);
    }
    return true;
}

} // namespace rotary
