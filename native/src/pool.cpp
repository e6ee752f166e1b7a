// SPDX-License-Identifier: MIT
//
// Pool: store, sizing and slots of one model on one device. See pool.hpp; the figures are in pool_figures.cpp.

#include "pool.hpp"

#include "error.hpp"
#include "inner.hpp"
#include "memory.hpp"

#include "ggml-alloc.h"
#include "ggml-impl.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>

namespace rotary {

pool::pool(ggml_backend_dev_t inner, pool_config chosen) :
    config(std::move(chosen)), inner_(inner),
    inner_is_host_(ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(inner))) {}

pool::~pool() {
    release();
}

// ---- store

// "blk.12.ffn_up_exps.weight" -> 12
static int32_t layer_number(const std::string & name) {
    if (name.compare(0, 4, "blk.") != 0) {
        return -1;
    }
    char *     end = nullptr;
    const long il  = strtol(name.c_str() + 4, &end, 10);
    return end != name.c_str() + 4 && *end == '.' ? (int32_t) il : -1;
}

void pool::add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (prepared_) {
        // Weights that come late, such as an adapter's: divide the budget anew at the next graph.
        notice(format("%s: %s was loaded after the slots were sized; slots start cold again", config.model.c_str(),
                      tensor->name));
        release();
    }
    auto paged           = std::make_unique<paged_tensor>();
    paged->name          = tensor->name;
    paged->type          = tensor->type;
    paged->ne[0]         = tensor->ne[0];
    paged->ne[1]         = tensor->ne[1];
    paged->ne[2]         = tensor->ne[2];
    paged->expert_bytes  = tensor->nb[2];
    paged->data          = (const char *) tensor->data;
    paged->owner         = owner;
    paged->n_expert_used = n_expert_used;
    tensors_.push_back(std::move(paged));
}

void pool::remove_owner(const void * owner) {
    const std::lock_guard<std::mutex> lock(mutex);
    release();
    tensors_.erase(std::remove_if(tensors_.begin(), tensors_.end(),
                                  [owner](const auto & tensor) { return tensor->owner == owner; }),
                   tensors_.end());
}

// ---- sizing

// Tensors of one layer number share their routing if they have the same number of experts; a tensor without a layer
// number stands alone. The same name again is another model's: those of the environment's pool can be several.
void pool::build_layers() {
    const std::lock_guard<std::mutex> lock(counter_mutex_); // readers of the figures walk over the layers
    layers_.clear();
    by_data_.clear();
    std::map<std::pair<int32_t, int64_t>, paged_layer *> known;
    for (const auto & tensor : tensors_) {
        const int32_t il    = layer_number(tensor->name);
        paged_layer * layer = il < 0 ? nullptr : known[{ il, tensor->ne[2] }];
        const bool    taken =
            layer != nullptr && std::any_of(layer->tensors.begin(), layer->tensors.end(),
                                            [&](const auto * each) { return each->name == tensor->name; });
        if (layer == nullptr || taken) {
            layers_.push_back(std::make_unique<paged_layer>());
            layer           = layers_.back().get();
            layer->il       = il;
            layer->n_expert = (int32_t) tensor->ne[2];
            if (il >= 0) {
                known[{ il, tensor->ne[2] }] = layer;
            }
        }
        layer->n_expert_used = std::max(layer->n_expert_used, std::min(tensor->n_expert_used, layer->n_expert));
        layer->expert_bytes += tensor->expert_bytes;
        layer->tensors.push_back(tensor.get());
        by_data_[tensor->data] = { layer, tensor.get() };
    }
    std::stable_sort(layers_.begin(), layers_.end(), [](const auto & a, const auto & b) { return a->il < b->il; });
}

uint64_t pool::free_bytes() const {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(inner_, &free, &total);
    // The CPU backend reports all of the machine's memory as free.
    const uint64_t left = inner_is_host_ ? host_available_bytes() : free;
    // Without a stated margin: a tenth of the memory, and at least what other programs' peaks and our own staging take.
    const uint64_t margin = config.margin_bytes ? config.margin_bytes : std::max<uint64_t>(total / 10, 512u << 20);
    return left > margin ? left - margin : 0;
}

// The layout a tensor's slots have: a repacked one if the inner device would use one for this weight, as stock
// llama.cpp then loads it so; else plain.
ggml_backend_buffer_type_t pool::slot_buft(const paged_tensor & tensor) const {
    if (config.repack) {
        for (ggml_backend_buffer_type_t buft : inner_extra_bufts(inner_)) {
            if (inner_supports_expert_matrix(inner_, buft, tensor.type, tensor.ne)) {
                return buft;
            }
        }
    }
    return ggml_backend_dev_buffer_type(inner_);
}

int32_t pool::prepare() {
    if (prepared_ || tensors_.empty()) {
        if (status_ != ROTARY_OK) {
            return fail((rotary_status) status_, status_text_);
        }
        return ROTARY_OK;
    }
    prepared_ = true;
    build_layers();
    if (inner_starts_threads(inner_)) {
        notice(format(
            "%s: this llama.cpp's CPU backend was built without OpenMP and starts its threads anew for each part "
            "of a graph; build it with GGML_OPENMP=ON",
            config.model.c_str()));
    }

    std::vector<layer_size> sizes;
    for (const auto & layer : layers_) {
        sizes.push_back({ layer->expert_bytes, layer->n_expert, layer->n_expert_used });
    }
    uint64_t   bytes     = budget_bytes(config.wanted, sizes, free_bytes());
    const bool automatic = config.wanted.what == budget::kind::automatic;
    while (true) {
        const std::vector<int32_t> n_slots = budget_slots(bytes, sizes);
        if (n_slots.empty()) {
            status_text_ = budget_too_small(config.model, config.budget_text, bytes, sizes);
            status_      = fail(ROTARY_ERR_BUDGET, status_text_);
            break;
        }
        status_ = allocate(n_slots);
        if (status_ == ROTARY_OK) {
            const auto [least, most] = std::minmax_element(n_slots.begin(), n_slots.end());
            GGML_LOG_INFO(
                "rotary: %s: experts of %zu layers (%s) paged on %s, budget %s is %s, %d to %d slots per layer\n",
                config.model.c_str(), layers_.size(), mib(budget_all_bytes(sizes)).c_str(),
                ggml_backend_dev_name(inner_), config.budget_text.c_str(), mib(bytes).c_str(), *least, *most);
            break;
        }
        status_text_ = last_error();
        if (!automatic) {
            break;
        }
        bytes = bytes / 10 * 9;
        notice(format("%s: %s has no room for the slots; auto budget lowered to %s", config.model.c_str(),
                      ggml_backend_dev_name(inner_), mib(bytes).c_str()));
    }

    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.budget_bytes     = bytes;
    totals_.min_budget_bytes = budget_min_bytes(sizes);
    totals_.expert_bytes     = budget_all_bytes(sizes);
    return status_;
}

int32_t pool::allocate(const std::vector<int32_t> & n_slots) {
    contexts_.clear();
    buffers_.clear();
    generation_++;

    std::map<ggml_backend_buffer_type_t, ggml_context *> by_buft;
    uint64_t                                             slot_bytes = 0;
    bool                                                 repacked   = false;
    std::unique_lock<std::mutex>                         lock(counter_mutex_);
    for (size_t i = 0; i < layers_.size(); i++) {
        paged_layer & layer = *layers_[i];
        const bool    all   = n_slots[i] == layer.n_expert;
        layer.host_plain    = inner_is_host_;
        for (const paged_tensor * tensor : layer.tensors) {
            layer.host_plain = layer.host_plain && slot_buft(*tensor) == ggml_backend_dev_buffer_type(inner_);
        }
        layer.path          = !all ? ROTARY_PATH_SLOTS : layer.host_plain ? ROTARY_PATH_MAPPED : ROTARY_PATH_RESIDENT;
        layer.table         = all ? nullptr : std::make_unique<slot_table>(layer.n_expert, n_slots[i]);
        layer.stats         = {};
        layer.stats.n_slots = n_slots[i];
        layer.stats.n_resident = all ? layer.n_expert : 0;
        repacked               = repacked || (inner_is_host_ && !layer.host_plain);
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
            tensor->slots = ggml_new_tensor_3d(ctx, tensor->type, tensor->ne[0], tensor->ne[1], n_slots[i]);
            ggml_format_name(tensor->slots, "%s (slots)", tensor->name.c_str());
            slot_bytes += ggml_nbytes(tensor->slots);
        }
    }
    totals_.repacked = repacked;
    lock.unlock();
    for (const auto & [buft, ctx] : by_buft) {
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (buffer == nullptr) {
            buffers_.clear();
            return fail(ROTARY_ERR_MEMORY,
                        format("%s: no memory for %s of slots on %s; lower the budget", config.model.c_str(),
                               mib(slot_bytes).c_str(), ggml_backend_dev_name(inner_)));
        }
        buffers_.emplace_back(buffer);
        // A GPU kernel may read past an expert's end into the next slot and multiply by zero: no NaN may be there. In
        // host memory this touches every page now, which costs more than the copy when it happens in decode.
        ggml_backend_buffer_clear(buffer, 0);
    }
    for (const auto & layer : layers_) {
        if (layer->path == ROTARY_PATH_RESIDENT) {
            for (int32_t expert = 0; expert < layer->n_expert; expert++) {
                page_in(nullptr, *layer, expert, expert);
            }
        }
    }
    lock.lock();
    totals_.slot_bytes = slot_bytes;
    return ROTARY_OK;
}

void pool::release() {
    if (!prepared_) {
        return;
    }
    for (ggml_backend_t user : users_) {
        ggml_backend_synchronize(user);
    }
    const char * print = getenv("ROTARY_STATS");
    if (print != nullptr && strcmp(print, "0") != 0) {
        print_summary();
    }
    generation_++;
    ids_buffer_.reset();
    ids_context_.reset();
    ids_capacity_ = 0;
    scratch_.reset();
    buffers_.clear();
    contexts_.clear();
    by_data_.clear();
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    layers_.clear();
    totals_.slot_bytes = 0;
    scratch_bytes_     = 0;
    prepared_          = false;
    status_            = ROTARY_OK;
}

// ---- for the executor

pool::place pool::find(const ggml_tensor * weight) const {
    const auto it = by_data_.find(weight->data);
    if (it == by_data_.end() || weight->ne[2] != it->second.tensor->ne[2] ||
        weight->nb[2] != it->second.tensor->expert_bytes) {
        return { nullptr, nullptr };
    }
    return it->second;
}

static uint64_t now_us() {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void pool::page_in(ggml_backend_t backend, paged_layer & layer, int32_t expert, int32_t slot) {
    for (paged_tensor * tensor : layer.tensors) {
        page_in(backend, *tensor, expert, slot);
    }
}

void pool::page_in(ggml_backend_t backend, paged_tensor & tensor, int32_t expert, int32_t slot) {
    // One slot as a tensor of its own: a repacking buffer takes whole tensors only.
    ggml_tensor one      = *tensor.slots;
    one.ne[2]            = 1;
    one.nb[3]            = one.nb[2];
    one.data             = (char *) one.data + one.nb[2] * slot;
    const uint64_t start = now_us();
    if (backend != nullptr) {
        ggml_backend_tensor_set_async(backend, &one, tensor.expert_data(expert), 0, tensor.expert_bytes);
    } else {
        ggml_backend_tensor_set(&one, tensor.expert_data(expert), 0, tensor.expert_bytes);
    }
    count_page(now_us() - start);
}

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

ggml_gallocr_t pool::scratch() {
    if (!scratch_) {
        scratch_.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(inner_)));
    }
    return scratch_.get();
}

bool pool::use_from(ggml_backend_t backend) {
    if (std::find(users_.begin(), users_.end(), backend) != users_.end()) {
        return false;
    }
    // Each backend waits for its own graphs once the pool is shared, but the first one did not know.
    for (ggml_backend_t user : users_) {
        ggml_backend_synchronize(user);
    }
    users_.push_back(backend);
    return true;
}

void pool::forget(ggml_backend_t backend) {
    const std::lock_guard<std::mutex> lock(mutex);
    users_.erase(std::remove(users_.begin(), users_.end(), backend), users_.end());
}

} // namespace rotary
