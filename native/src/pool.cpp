// SPDX-License-Identifier: MIT
//
// Pool: store, sizing and slots of one model on one device. See pool.hpp; the figures are in pool_figures.cpp.

#include "pool.hpp"

#include "clock.hpp"
#include "error.hpp"
#include "inner.hpp"
#include "memory.hpp"

#include "ggml-impl.h"

#include <algorithm>
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

void pool::add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (prepared_) {
        // Weights that come late, such as an adapter's: divide the budget anew at the next graph.
        notice(format("%s: %s was loaded after the slots were sized; slots start cold again", config.model.c_str(),
                      tensor->name));
        release();
    }
    auto paged                = std::make_unique<paged_tensor>();
    paged->name               = tensor->name;
    paged->type               = tensor->type;
    paged->ne[0]              = tensor->ne[0];
    paged->ne[1]              = tensor->ne[1];
    paged->ne[2]              = tensor->ne[2];
    paged->expert_bytes       = tensor->nb[2];
    paged->data               = (const char *) tensor->data;
    paged->owner              = owner;
    paged->n_expert_used      = n_expert_used;
    const paged_tensor * last = tensors_.empty() ? nullptr : tensors_.back().get();
    if (is_mapped && last != nullptr && last->owner == owner &&
        last->file) { // one mapping: no need to look it up again
        paged->file   = last->file;
        paged->offset = last->offset + (paged->data - last->data);
    } else if (is_mapped) {
        paged->file = weight_file::at(paged->data, paged->offset, no_direct_);
    }
    register_experts(*paged);
    {
        const std::lock_guard<std::mutex> counters(counter_mutex_);
        totals_.expert_bytes += paged->expert_bytes * paged->ne[2];
    }
    tensors_.push_back(std::move(paged));
}

void pool::remove_owner(const void * owner) {
    const std::lock_guard<std::mutex> lock(mutex);
    release();
    locked_.clear(); // and locked again for those that stay
    for (const auto & tensor : tensors_) {
        tensor->locked = tensor->on_device = nullptr;
    }
    const auto gone = std::stable_partition(tensors_.begin(), tensors_.end(),
                                            [owner](const auto & tensor) { return tensor->owner != owner; });
    std::for_each(gone, tensors_.end(), [&](const auto & tensor) {
        forget_experts(*tensor);
        const std::lock_guard<std::mutex> counters(counter_mutex_);
        totals_.expert_bytes -= tensor->expert_bytes * tensor->ne[2];
    });
    tensors_.erase(gone, tensors_.end());
    detached_.erase(std::remove(detached_.begin(), detached_.end(), owner), detached_.end());
    if (tensors_.empty()) {
        staging_lock_ = {};
        direct_.reset();
    }
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
    for (size_t i = 0; i + 1 < layers_.size(); i++) {
        layers_[i]->next = layers_[i + 1].get();
    }
}

std::vector<layer_size> pool::layer_sizes() const {
    std::vector<layer_size> sizes;
    for (const auto & layer : layers_) {
        sizes.push_back({ layer->expert_bytes, layer->n_expert, layer->n_expert_used });
    }
    return sizes;
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

    choose_store();
    open_link();
    const std::vector<layer_size> sizes     = layer_sizes();
    const bool                    automatic = config.wanted.what == budget::kind::automatic;
    const uint64_t                free      = free_bytes();
    uint64_t                      bytes     = budget_bytes(config.wanted, sizes, free);
    if (automatic && (direct_ || !inner_is_host_)) {
        bytes = std::max(bytes, budget_min_bytes(sizes)); // out of the margin, rather than none
    }
    while (true) {
        const std::vector<int32_t> n_slots = budget_slots(bytes, sizes);
        if (n_slots.empty()) {
            status_text_ = budget_too_small(config.model, config.budget_text, bytes, sizes);
            status_      = fail(ROTARY_ERR_BUDGET, status_text_);
            break;
        }
        // In host memory, address space for what may become free later costs nothing until it is touched.
        std::vector<int32_t> n_allocated = n_slots;
        if (automatic && direct_ && inner_is_host_) {
            n_allocated = budget_slots(std::min(host_memory_now().available, budget_all_bytes(sizes)), sizes);
            n_allocated.resize(n_slots.size(), 0);
            for (size_t i = 0; i < n_slots.size(); i++) {
                n_allocated[i] = std::max(n_allocated[i], n_slots[i]);
            }
        }
        status_ = allocate(n_slots, n_allocated);
        if (status_ == ROTARY_OK) {
            const auto [least, most] = std::minmax_element(n_slots.begin(), n_slots.end());
            GGML_LOG_INFO(
                "rotary: %s: experts of %zu layers (%s) paged on %s, budget %s is %s, %d to %d slots per layer\n",
                config.model.c_str(), layers_.size(), mib(budget_all_bytes(sizes)).c_str(),
                ggml_backend_dev_name(inner_), config.budget_text.c_str(), mib(bytes).c_str(), *least, *most);
            memory_seen_us_ = now_us();
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

    count_reads();
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.budget_bytes = bytes;
    most_slot_bytes_     = 0;
    for (const auto & layer : layers_) {
        most_slot_bytes_ += layer->expert_bytes * layer->n_allocated;
    }
    totals_.min_budget_bytes = budget_min_bytes(sizes);
    return status_;
}

int32_t pool::allocate(const std::vector<int32_t> & n_slots, const std::vector<int32_t> & n_allocated) {
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
        bool          plain = inner_is_host_;
        for (const paged_tensor * tensor : layer.tensors) {
            plain = plain && slot_buft(*tensor) == ggml_backend_dev_buffer_type(inner_);
        }
        layer.host_plain    = plain && !direct_;
        layer.path          = !all ? ROTARY_PATH_SLOTS : layer.host_plain ? ROTARY_PATH_MAPPED : ROTARY_PATH_RESIDENT;
        layer.table         = all ? nullptr : std::make_unique<slot_table>(layer.n_expert, n_slots[i]);
        layer.n_allocated   = n_allocated[i];
        const bool in_place = plain && direct_ && reads_whole_sectors(layer);
        layer.landing       = in_place ? layer.table.get() : nullptr;
        layer.stats         = {};
        layer.stats.n_slots = n_slots[i];
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
            if (in_place && tensor->offset % tensor->file->alignment() != 0) {
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
            buffers_.clear();
            return fail(ROTARY_ERR_MEMORY,
                        format("%s: no memory for %s of slots on %s; lower the budget", config.model.c_str(),
                               mib(slot_bytes).c_str(), ggml_backend_dev_name(inner_)));
        }
        buffers_.emplace_back(buffer);
        if (!inner_is_host_) {
            // A GPU kernel may read past an expert's end into the next slot and multiply by zero: no NaN may be there.
            ggml_backend_buffer_clear(buffer, 0);
        }
    }
    for (const auto & layer : layers_) {
        if (layer->path == ROTARY_PATH_SLOTS && inner_is_host_) {
            touch(*layer, 0, layer->stats.n_slots);
        }
        if (layer->path == ROTARY_PATH_RESIDENT && fill_resident(*layer) != ROTARY_OK) {
            return last_status();
        }
    }
    allocate_ram_tier();
    if (!allocate_tables()) {
        return fail(ROTARY_ERR_MEMORY, format("%s: no memory for page tables on %s; lower the budget",
                                              config.model.c_str(), ggml_backend_dev_name(inner_)));
    }
    lock.lock();
    totals_.slot_bytes = slot_bytes;
    return ROTARY_OK;
}

// Slots at their parts' offset in the file modulo its alignment, with room for a sector around each tensor's slots.
ggml_backend_buffer_t pool::allocate_in_place(ggml_backend_buffer_type_t buft) const {
    std::vector<paged_tensor *> placed;
    size_t                      size     = 0;
    const auto                  align_of = [&](const paged_tensor * tensor) {
        return std::max(tensor->file->alignment(), ggml_backend_buft_get_alignment(buft));
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
            at                 = (at + align - 1) / align * align + tensor->offset % tensor->file->alignment();
            ggml_backend_tensor_alloc(buffer, tensor->slots, (void *) at);
            tensor->landing       = (char *) at;
            tensor->landing_bytes = tensor->slots->nb[2];
            at += tensor->slots->nb[3] + align;
        }
    }
    return buffer;
}

// Every expert into its slot, once.
int32_t pool::fill_resident(paged_layer & layer) {
    for (paged_tensor * tensor : layer.tensors) {
        for (int32_t expert = 0; direct_ && expert < layer.n_expert; expert++) {
            direct_->demand(*tensor, expert);
        }
    }
    for (paged_tensor * tensor : layer.tensors) {
        for (int32_t expert = 0; expert < layer.n_expert; expert++) {
            const char * bytes = fetch(*tensor, expert);
            if (bytes == nullptr) {
                return last_status();
            }
            ggml_tensor slot = tensor->slot(expert);
            ggml_backend_tensor_set(&slot, bytes, 0, tensor->expert_bytes);
            release(*tensor, expert);
        }
    }
    return ROTARY_OK;
}

// ---- after a failure, and between runs

void pool::forget_slots() {
    if (direct_) {
        direct_->clear();
    }
    for (const auto & layer : layers_) {
        if (layer->table) {
            layer->table->clear();
            layer->table_on_device = false;
        }
        if (layer->ram) {
            layer->ram->clear();
        }
    }
}

void pool::set_budget(const budget & wanted, const std::string & text) {
    release();
    config.wanted      = wanted;
    config.budget_text = text;
}

void pool::release() {
    if (!prepared_) {
        return;
    }
    for (ggml_backend_t user : users_) {
        ggml_backend_synchronize(user);
    }
    if (link_ && link_->synchronize() && n_states_ > 0) {
        read_states();
    }
    const char * print = getenv("ROTARY_STATS");
    if (print != nullptr && strcmp(print, "0") != 0) {
        print_summary();
    }
    if (direct_) {
        direct_->clear(); // parts point at tensors
    }
    generation_++;
    tables_buffer_.reset();
    tables_context_.reset();
    n_states_ = 0;
    ram_.reset();
    ram_bytes_ = 0;
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
