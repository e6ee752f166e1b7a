// SPDX-License-Identifier: MIT
//
// Pool: experts on an inner device that has a link. See pool.hpp, link.hpp.
//
// Where the device can read the store itself, a lookup is resolved there: the layer's page table lives in its memory,
// and the host neither waits for the routing nor moves a byte. The host's table is the other place where the truth can
// be: a batch that needs it takes the table back, and the next lookup on the device takes it again.

#include "base/error.hpp"
#include "base/memory.hpp"
#include "pool/pool.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

namespace rotary {

bool pin_parse(const std::string & text, pin_policy & pin) {
    pin = text == "on" ? pin_policy::on : text == "off" ? pin_policy::off : pin_policy::automatic;
    return pin != pin_policy::automatic || text == "auto";
}

// ---- host memory

// Locked memory is lost to everything else on the machine.
bool pool::may_lock(uint64_t bytes, std::string & reason) const {
    const uint64_t available = host_memory_now().available;
    if (config.pin == pin_policy::off) {
        reason = "pin is \"off\"";
        return false;
    }
    if (config.pin == pin_policy::automatic && bytes > available / 4 * 3) {
        reason = format("they take %s, and of the %s available no more than three quarters are locked unasked; set pin "
                        "to \"on\" to lock them all",
                        mib(bytes).c_str(), mib(available).c_str());
        return false;
    }
    return true;
}

// Page-lock the experts where they lie, so that copies run beside computation and the device can read them itself; where
// the system refuses that, in a copy, if the user has said that memory may be spent so. All or nothing.
bool pool::lock_store(std::string & reason) {
    if (!locked_.empty()) {
        return true;
    }
    const uintptr_t           page = sysconf(_SC_PAGESIZE);
    std::vector<memory_range> ranges;
    uint64_t                  bytes = 0;
    for (const auto & tensor : tensors_) {
        const auto begin = (uintptr_t) tensor->data / page * page;
        const auto end   = ((uintptr_t) tensor->data + tensor->expert_bytes * tensor->ne[2] + page - 1) / page * page;
        ranges.push_back({ (char *) begin, (char *) end });
        bytes += end - begin;
    }
    if (!may_lock(bytes, reason)) {
        return false;
    }
    std::sort(ranges.begin(), ranges.end(), [](const auto & a, const auto & b) { return a.begin < b.begin; });
    std::vector<locked_range> locked;
    for (const memory_range & next : ranges) {
        if (!locked.empty() && next.begin < locked.back().end) {
            // Shares a page with the one before, which cannot be locked twice.
            locked.back().end = std::max(locked.back().end, next.end);
        } else {
            locked.push_back({ next.begin, next.end, {} });
        }
    }
    for (locked_range & range : locked) {
        const size_t size = range.end - range.begin;
        range.lock        = link_->lock(range.begin, size, true, reason);
        if (!range.lock.memory && config.pin == pin_policy::on) {
            std::string none_either;
            range.lock = link_->host_memory(size, none_either);
            if (range.lock.memory) {
                memcpy(range.lock.memory.get(), range.begin, size);
            }
        }
        if (!range.lock.memory) {
            return false;
        }
    }
    locked_ = std::move(locked);
    return true;
}

void pool::unlock_store() {
    locked_.clear();
    for (const auto & tensor : tensors_) {
        tensor->locked = tensor->on_device = nullptr;
    }
}

void pool::open_link() {
    if (inner_is_host_) {
        return;
    }
    std::string reason;
    if (!link_) {
        link_ = link::to(inner_, reason);
    }
    if (!link_) {
        if (!reason.empty()) {
            notice(format("%s: the host copies experts to %s and waits for each layer: %s", config.model.c_str(),
                          ggml_backend_dev_name(inner_), reason.c_str()));
        }
        return;
    }
    bool locked = false;
    if (direct_) {
        if (!staging_lock_.memory) {
            staging_lock_ = link_->lock(direct_->staging(), direct_->staging_bytes(), false, reason);
        }
        locked = staging_lock_.memory != nullptr;
        if (locked && std::any_of(tensors_.begin(), tensors_.end(), [](const auto & each) { return !each->direct; })) {
            locked = false;
            reason = "not all are read from files";
        }
    } else {
        locked = lock_store(reason);
    }
    uint64_t locked_bytes = direct_ && staging_lock_.memory ? direct_->staging_bytes() : 0;
    locked_bytes += ring_ ? staging_ring::block_bytes * staging_ring::n_blocks : 0;
    for (const locked_range & range : locked_) {
        locked_bytes += range.end - range.begin;
        for (const auto & tensor : tensors_) {
            if (tensor->data >= range.begin && tensor->data < range.end) {
                tensor->locked    = (const char *) range.lock.memory.get() + (tensor->data - range.begin);
                tensor->on_device = range.lock.on_device + (tensor->data - range.begin);
            }
        }
    }
    {
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        totals_.locked_bytes = locked_bytes;
    }
    copies_by_link_ = true;
    if (locked) {
        GGML_LOG_INFO("rotary: %s: %s page-locked for %s\n", config.model.c_str(), mib(locked_bytes).c_str(),
                      ggml_backend_dev_name(inner_));
        return;
    }
    if (ring() == nullptr) {
        copies_by_link_ = false;
        notice(format("%s: the host copies experts to %s and waits for each layer: %s", config.model.c_str(),
                      ggml_backend_dev_name(inner_), last_error()));
        return;
    }
    notice(format("%s: experts are not page-locked but pass through %s that is, which costs the host's time: %s",
                  config.model.c_str(), mib(staging_ring::block_bytes * staging_ring::n_blocks).c_str(),
                  reason.c_str()));
}

staging_ring * pool::ring() {
    if (!ring_) {
        std::string reason;
        ring_ = std::make_unique<staging_ring>(link_, inner_, reason);
        if (!ring_->ok()) {
            ring_.reset();
            fail(ROTARY_ERR_MEMORY, format("%s: %s", ggml_backend_dev_name(inner_), reason.c_str()));
            return nullptr;
        }
        if (!ring_->why().empty()) {
            notice(format("%s: %s", config.model.c_str(), ring_->why().c_str()));
        }
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        totals_.locked_bytes += staging_ring::block_bytes * staging_ring::n_blocks;
    }
    return ring_.get();
}

bool pool::is_locked(const paged_tensor & tensor, const char * fetched) const {
    if (!tensor.direct) {
        return tensor.locked != nullptr;
    }
    if (ram_ && fetched >= ram_.get() && fetched < ram_.get() + ram_bytes_) {
        return ram_locked_;
    }
    return staging_lock_.memory != nullptr && fetched >= direct_->staging() &&
           fetched < direct_->staging() + direct_->staging_bytes();
}

// ---- page tables

static size_t padded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

// Page tables in the inner device's memory for the layers whose lookups it can resolve.
bool pool::allocate_tables() {
    tables_buffer_.reset();
    tables_context_.reset();
    states_            = {};
    n_states_          = 0;
    const char * asked = getenv("ROTARY_DEVICE_LOOKUPS"); // 0: the host resolves, for comparison
    if (!link_ || (asked != nullptr && strcmp(asked, "0") == 0)) {
        return true;
    }
    size_t  bytes       = padded(sizeof(rotary_page_state) * layers_.size());
    int64_t most_embd   = 0;
    int32_t most_expert = 0;
    for (const auto & layer : layers_) {
        layer->resolved     = {};
        layer->table_at     = 0;
        layer->ahead        = {};
        layer->most_embd    = 0;
        const bool readable = std::all_of(layer->tensors.begin(), layer->tensors.end(),
                                          [](const paged_tensor * tensor) { return tensor->on_device != nullptr; });
        if (layer->table && readable && !layer->table->can_be_on_device()) {
            notice(
                format("%s: the host learns each routing and waits for it: policy %s cannot run on %s; lru and lfu can",
                       config.model.c_str(), policy_name(), ggml_backend_dev_name(inner_)));
            continue;
        }
        if (layer->table && readable && layer->tensors.size() <= ROTARY_LINK_MOST_TENSORS) {
            layer->table_at = bytes;
            for (const paged_tensor * tensor : layer->tensors) {
                layer->most_embd = std::max(layer->most_embd, tensor->ne[0]); // that of the first, whichever that is
            }
            bytes += padded(rotary_page_table_bytes(layer->n_expert, layer->table->n_slots()));
            bytes += padded(sizeof(float) * layer->most_embd);
            most_embd   = std::max(most_embd, layer->most_embd);
            most_expert = std::max(most_expert, layer->n_expert);
            n_states_++;
        }
    }
    const size_t copy_at   = bytes;
    const size_t scores_at = copy_at + padded(sizeof(float) * most_embd * ROTARY_PAGE_MOST_TOKENS);
    bytes                  = scores_at + padded(sizeof(float) * most_expert * ROTARY_PAGE_MOST_TOKENS);
    if (n_states_ == 0) {
        return true;
    }
    tables_context_.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    tables_ = ggml_new_tensor_1d(tables_context_.get(), GGML_TYPE_I8, bytes);
    tables_buffer_.reset(
        ggml_backend_alloc_ctx_tensors_from_buft(tables_context_.get(), ggml_backend_dev_buffer_type(inner_)));
    std::string reason;
    states_ = link_->host_memory(sizeof(rotary_page_state) * layers_.size(), reason);
    if (!tables_buffer_ || !states_.memory) {
        for (const auto & layer : layers_) {
            layer->table_at = 0;
        }
        n_states_ = 0;
        if (tables_buffer_) {
            notice(format("%s: the host learns each routing and waits for it: %s cannot count lookups for the host: %s",
                          config.model.c_str(), ggml_backend_dev_name(inner_), reason.c_str()));
        }
        return tables_buffer_ != nullptr;
    }
    ggml_backend_buffer_clear(tables_buffer_.get(), 0);
    std::fill_n((char *) states_.memory.get(), sizeof(rotary_page_state) * layers_.size(), '\0');
    char * base = (char *) tables_->data;
    for (size_t i = 0; i < layers_.size(); i++) {
        paged_layer & layer = *layers_[i];
        if (layer.table_at == 0) {
            continue;
        }
        rotary_link_layer & its      = layer.resolved.layer;
        int32_t             n_pieces = 0;
        its.n_tensors                = (int32_t) layer.tensors.size();
        for (size_t t = 0; t < layer.tensors.size(); t++) {
            const paged_tensor & tensor = *layer.tensors[t];
            its.tensors[t] = { tensor.on_device, tensor.slots->data, tensor.expert_bytes, tensor.slots->nb[2] };
            n_pieces += rotary_link_n_pieces(its.tensors[t]);
        }
        its.table = rotary_page_table_at(base + layer.table_at, (rotary_page_state *) (void *) base + i, layer.n_expert,
                                         layer.table->n_slots(), n_pieces);
        layer.ahead.layer  = its;
        layer.ahead.copy   = (float *) (void *) (base + copy_at);
        layer.ahead.scores = (float *) (void *) (base + scores_at);
    }
    return true;
}

bool pool::set_scale(paged_layer & layer, const std::vector<float> & scale) {
    if ((int64_t) scale.size() > layer.most_embd) {
        return false;
    }
    const size_t at = layer.table_at + padded(rotary_page_table_bytes(layer.n_expert, layer.table->n_slots()));
    ggml_backend_tensor_set(tables_, scale.data(), at, sizeof(float) * scale.size());
    layer.ahead.scale = (const float *) (const void *) ((const char *) tables_->data + at);
    return true;
}

bool pool::resolves_on_device(const paged_layer & layer, int64_t n_ids) const {
    return layer.table_at != 0 && n_ids <= layer.table->n_slots();
}

// An image of a layer's table as the device has it, behind its state.
static rotary_page_table image_of(std::vector<char> & image, const rotary_page_table & like) {
    image.resize(sizeof(rotary_page_state) + rotary_page_table_bytes(like.n_expert, like.n_slots));
    return rotary_page_table_at(image.data() + sizeof(rotary_page_state), (rotary_page_state *) (void *) image.data(),
                                like.n_expert, like.n_slots, like.n_pieces);
}

void pool::table_to_device(paged_layer & layer) {
    if (layer.table_on_device) {
        return;
    }
    std::vector<char>       image;
    const rotary_page_table table = image_of(image, layer.resolved.layer.table);
    *table.state                  = layer.state;
    layer.table->save(table);
    ggml_backend_tensor_set(tables_, image.data() + sizeof(rotary_page_state), layer.table_at,
                            image.size() - sizeof(rotary_page_state));
    ggml_backend_tensor_set(tables_, image.data(), (char *) layer.resolved.layer.table.state - (char *) tables_->data,
                            sizeof(rotary_page_state));
    layer.table_on_device = true;
}

bool pool::table_to_host(paged_layer & layer) {
    if (!layer.table_on_device) {
        return true;
    }
    if (!link_->synchronize()) {
        return false;
    }
    std::vector<char>       image;
    const rotary_page_table table = image_of(image, layer.resolved.layer.table);
    ggml_backend_tensor_get(tables_, image.data() + sizeof(rotary_page_state), layer.table_at,
                            image.size() - sizeof(rotary_page_state));
    ggml_backend_tensor_get(tables_, image.data(), (char *) layer.resolved.layer.table.state - (char *) tables_->data,
                            sizeof(rotary_page_state));
    rotary_page_settle(rotary_page_alone{}, table, -1);
    if (!take_over(layer, *table.state)) {
        return false;
    }
    layer.table->load(table);
    layer.table_on_device   = false;
    layer.resolved.foretold = false;
    return true;
}

// ---- what the device has counted

// False with this thread's error if it has refused a lookup.
bool pool::take_over(paged_layer & layer, const rotary_page_state & state) {
    if (state.refused != 0) {
        fail(ROTARY_ERR_ARG, format("%s: layer %d routed to an expert that it does not have; the graph is broken",
                                    config.model.c_str(), layer.il));
        return false;
    }
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    rotary_layer_stats &              stats  = layer.stats;
    const uint64_t                    misses = state.misses - layer.state.misses;
    stats.lookups += state.lookups - layer.state.lookups;
    totals_.device_lookups += state.lookups - layer.state.lookups;
    stats.requests += state.requests - layer.state.requests;
    stats.misses += misses;
    stats.hits += state.requests - layer.state.requests - misses;
    stats.evictions += state.evictions - layer.state.evictions;
    const rotary_page_table & table  = layer.resolved.layer.table;
    const uint64_t            unused = state.pieces_unused - layer.state.pieces_unused;
    stats.bytes_paged += misses * layer.expert_bytes + unused * layer.expert_bytes / table.n_pieces;
    totals_.predicted += state.predicted - layer.state.predicted;
    totals_.predicted_right += state.predicted_right - layer.state.predicted_right;
    totals_.prefetched += state.prefetched - layer.state.prefetched;
    totals_.prefetch_used += state.prefetch_used - layer.state.prefetch_used;
    totals_.late_hits += state.late_hits - layer.state.late_hits;
    stats.n_resident = state.n_resident;
    layer.state      = state;
    return true;
}

bool pool::send_states() {
    return link_->copy(states_.memory.get(), tables_->data, sizeof(rotary_page_state) * layers_.size());
}

// A layer for which experts are copied ahead has been looked up by no lookup since; its figures change until the next one.
bool pool::take_states() {
    const auto * states = (const rotary_page_state *) states_.memory.get();
    for (size_t i = 0; i < layers_.size(); i++) {
        paged_layer & layer = *layers_[i];
        if (layer.table_on_device && !layer.resolved.foretold && !take_over(layer, states[i])) {
            return false;
        }
    }
    return true;
}

} // namespace rotary
