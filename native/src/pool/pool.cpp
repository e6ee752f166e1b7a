// SPDX-License-Identifier: MIT
//
// Pool: store and sizing of one model on one device. See pool.hpp; the slots themselves are in pool_slots.cpp, the
// figures in pool_figures.cpp.

#include "pool/pool.hpp"

#include "base/clock.hpp"
#include "base/error.hpp"
#include "base/inner_device.hpp"
#include "base/memory.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

namespace rotary {

pool::pool(ggml_backend_dev_t inner, pool_config chosen) :
    config(std::move(chosen)), inner_(inner),
    inner_is_host_(ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(inner))),
    // Not waited for: a graph may take long, and wait for a lock of Python's that the one who forks holds.
    guard_([this] { locked_for_fork_ = !held_here() && mutex.try_lock(); },
           [this](bool in_child) {
               if (in_child && (!locked_for_fork_ || !inner_is_host_)) {
                   leave_incomplete();
               } else if (locked_for_fork_) {
                   mutex.unlock();
               }
           }) {}

void pool::leave_incomplete() {
    new (&mutex) std::mutex; // who held it may not be here
    holder_     = std::thread::id();
    incomplete_ = true;
    (void) ring_.release(); // nor are its threads
    self_ = weak_from_this().lock();
}

pool::~pool() {
    release();
}

// ---- store

int32_t layer_number(const std::string & name) {
    if (name.compare(0, 4, "blk.") != 0) {
        return -1;
    }
    char *     end = nullptr;
    const long il  = strtol(name.c_str() + 4, &end, 10);
    return end != name.c_str() + 4 && *end == '.' ? (int32_t) il : -1;
}

void pool::add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped) {
    const hold lock(*this);
    if (prepared_) {
        // Weights that come late, such as an adapter's: divide the budget anew at the next graph.
        notice(format("%s: %s was loaded after the slots were sized; slots start cold again", config.model.c_str(),
                      tensor->name));
        release();
        unlock_store(); // the new ones are locked with the others
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
    paged->is_mapped          = is_mapped;
    paged->n_expert_used      = n_expert_used;
    const paged_tensor * last = tensors_.empty() ? nullptr : tensors_.back().get();
    if (is_mapped && last != nullptr && last->owner == owner &&
        last->file) { // one mapping: no need to look it up again
        paged->file   = last->file;
        paged->offset = last->offset + (paged->data - last->data);
    } else if (is_mapped) {
        paged->file = weight_file::at(paged->data, paged->offset, no_direct_);
    }
    const paged_tensor & its = *paged;
    tensors_.push_back(std::move(paged)); // first: what follows may fail, and is undone with the owner
    {
        const std::lock_guard<std::mutex> counters(counter_mutex_);
        totals_.expert_bytes += its.expert_bytes * its.ne[2];
    }
    register_experts(its);
    if (copied_.count(owner) == 0) {
        copied_[owner] = copied_by_loader();
    }
}

void pool::remove_owner(const void * owner) {
    const hold lock(*this);
    if (incomplete_) {
        forget_experts_of(owner);
        return;
    }
    release();
    unlock_store(); // and locked again for those that stay
    const auto gone = std::stable_partition(tensors_.begin(), tensors_.end(),
                                            [owner](const auto & tensor) { return tensor->owner != owner; });
    forget_experts_of(owner);
    std::for_each(gone, tensors_.end(), [&](const auto & tensor) {
        const std::lock_guard<std::mutex> counters(counter_mutex_);
        totals_.expert_bytes -= tensor->expert_bytes * tensor->ne[2];
    });
    tensors_.erase(gone, tensors_.end());
    copied_.erase(owner);
    if (std::none_of(tensors_.begin(), tensors_.end(), [](const auto & tensor) { return tensor->direct; })) {
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
    for (size_t i = 0; i < layers_.size(); i++) {
        layers_[i]->index = (int32_t) i;
        layers_[i]->next  = i + 1 < layers_.size() ? layers_[i + 1].get() : nullptr;
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

// Address space for the slots that layers may get from others. It costs nothing until it is touched, but systems refuse
// more at once than there is memory: then layers may grow by less.
std::vector<int32_t> pool::with_room_to_move(const std::vector<int32_t> & n_allocated,
                                             const std::vector<int32_t> & n_slots) const {
    const uint64_t available = host_memory_now().available;
    for (int32_t part = 1; config.adaptive && inner_is_host_ && part <= 8; part *= 2) {
        std::vector<int32_t> n_wanted = n_allocated;
        uint64_t             bytes    = 0;
        for (size_t i = 0; i < n_slots.size(); i++) {
            if (n_slots[i] < layers_[i]->n_expert) {
                const int32_t more = (slot_split::most(n_slots[i], layers_[i]->n_expert) - n_slots[i]) / part;
                n_wanted[i]        = std::max(n_allocated[i], n_slots[i] + more);
            }
            bytes += layers_[i]->expert_bytes * n_wanted[i];
        }
        if (bytes <= available) {
            return n_wanted;
        }
    }
    return n_allocated;
}

// What an exception leaves half done is undone, and tried again when it is asked for again.
int32_t pool::prepare() {
    try {
        return size();
    } catch (...) {
        const int32_t status = fail_by_exception();
        return guarded(status, [&] {
            release();
            return status;
        });
    }
}

int32_t pool::size() {
    if (incomplete_) {
        return fail(ROTARY_ERR_STATE,
                    format("%s: this process was forked %s, so it cannot be used here; load the model in this process",
                           config.model.c_str(),
                           inner_is_host_ ? "while its parent computed with the model" : "after the model was loaded"));
    }
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
        most_slot_bytes_ = 0;
        for (size_t i = 0; i < n_slots.size(); i++) {
            most_slot_bytes_ += sizes[i].expert_bytes * n_allocated[i];
        }
        const std::vector<int32_t> with_room = with_room_to_move(n_allocated, n_slots);
        status_                              = allocate(n_slots, with_room);
        if (status_ == ROTARY_ERR_MEMORY && with_room != n_allocated) {
            const std::string why = last_error();
            status_               = allocate(n_slots, n_allocated);
            if (status_ == ROTARY_OK) {
                notice(format("%s: slots stay as they are divided between layers: no address space to move them (%s)",
                              config.model.c_str(), why.c_str()));
            }
        }
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
        if (!automatic || status_ != ROTARY_ERR_MEMORY) {
            break;
        }
        bytes = bytes / 10 * 9;
        notice(format("%s: %s has no room for the slots; auto budget lowered to %s", config.model.c_str(),
                      ggml_backend_dev_name(inner_), mib(bytes).c_str()));
    }

    count_reads();
    if (status_ == ROTARY_ERR_READ) {
        release(); // the next graph may find the disk well
        return ROTARY_ERR_READ;
    }
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.budget_bytes     = bytes;
    totals_.min_budget_bytes = budget_min_bytes(sizes);
    return status_;
}

// ---- after a failure, and between runs

bool pool::forget_slots() noexcept {
    spoiled_ = true;
    return guarded(false, [&] {
        forget_tables();
        spoiled_ = false;
        return true;
    });
}

void pool::forget_tables() {
    if (direct_) {
        direct_->clear();
    }
    if (link_) {
        link_->synchronize(); // lookups that were enqueued before the failure still change tables
    }
    for (const auto & layer : layers_) {
        if (layer->table) {
            layer->table->clear();
            layer->table_on_device   = false;
            layer->resolved.foretold = false;
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
    if (!prepared_ || incomplete_) {
        return;
    }
    for (ggml_backend_t user : users_) {
        ggml_backend_synchronize(user);
    }
    if (link_) {
        link_->synchronize(); // it may still copy ahead, into slots
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
    free_slots();
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
    const hold lock(*this);
    if (incomplete_) {
        return;
    }
    users_.erase(std::remove(users_.begin(), users_.end(), backend), users_.end());
}

} // namespace rotary
