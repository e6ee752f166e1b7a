// SPDX-License-Identifier: MIT
//
// Pool: how much memory its slots may take, and what becomes of it while others take theirs. See pool.hpp.

#include "base/clock.hpp"
#include "base/error.hpp"
#include "base/memory.hpp"
#include "pool/pool.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace rotary {

// ---- sizing

uint64_t pool::host_margin(uint64_t total) {
    return std::max<uint64_t>(total / 24, 64u << 20);
}

// What "auto" leaves free: for other programs' peaks, and for what of ours is small and comes later.
uint64_t pool::margin_bytes(uint64_t total) const {
    if (config.margin_bytes != 0) {
        return config.margin_bytes;
    }
    return inner_is_host_ ? host_margin(total) : std::max<uint64_t>(total / 10, 512u << 20);
}

// Memory that slots may take besides what they have.
uint64_t pool::free_bytes() const {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(inner_, &free, &total);
    uint64_t wanted = margin_bytes(total);
    uint64_t left   = free;
    if (inner_is_host_) { // the CPU backend reports all of the machine's memory as free
        const host_memory memory = host_memory_now();
        left                     = memory.available;
        // What graphs have not touched by now they seldom touch at once: half of it, and the margin, will do.
        const uint64_t promised = host_memory_promised();
        wanted                  = margin_bytes(memory.total) + (buffers_.empty() ? promised : promised / 2);
    }
    return left > wanted ? left - wanted : 0;
}

// ---- slots in host memory

// In host memory, have the pages of slots [first, last) now: first faults cost more than the copies when they come
// during decode.
void pool::touch(const paged_layer & layer, int32_t first, int32_t last) {
    for (const paged_tensor * tensor : layer.tensors) {
        memset((char *) tensor->slots->data + tensor->slots->nb[2] * first, 0, tensor->slots->nb[2] * (last - first));
    }
}

// Give the whole pages of slots [first, last) back to the system; they read as zeros afterwards.
void pool::give_back(const paged_layer & layer, int32_t first, int32_t last) {
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (const paged_tensor * tensor : layer.tensors) {
        const auto begin = ((uintptr_t) tensor->slots->data + tensor->slots->nb[2] * first + page - 1) / page * page;
        const auto end   = ((uintptr_t) tensor->slots->data + tensor->slots->nb[2] * last) / page * page;
        if (begin < end) {
            madvise((void *) begin, end - begin, MADV_DONTNEED);
        }
    }
}

void pool::resize(uint64_t bytes) {
    const std::vector<int32_t> n_slots    = budget_slots(bytes, layer_sizes());
    uint64_t                   slot_bytes = 0;
    for (size_t i = 0; i < layers_.size(); i++) {
        paged_layer & layer = *layers_[i];
        if (layer.table) {
            settle(layer, true);
            const int32_t before = layer.table->n_slots();
            const int32_t now    = std::min(n_slots[i], layer.n_allocated);
            layer.table->resize(now);
            if (now > before) {
                touch(layer, before, now);
            } else {
                give_back(layer, now, before);
            }
            // Not while the table changes: a policy of the caller's may ask for the figures.
            const std::lock_guard<std::mutex> lock(counter_mutex_);
            layer.stats.n_slots    = now;
            layer.stats.n_resident = layer.table->n_resident();
        }
        slot_bytes += layer.expert_bytes * layer.stats.n_slots;
    }
    {
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        totals_.slot_bytes = slot_bytes;
    }
    start_split();
}

// ---- slots that move between layers

void pool::start_split() {
    std::vector<slot_split::layer_slots> sizes;
    for (const auto & layer : layers_) {
        const int32_t n = layer->table ? layer->table->n_slots() : layer->n_expert;
        sizes.push_back({ layer->n_expert, n, layer->n_expert_used,
                          std::min(slot_split::most(n, layer->n_expert), layer->n_allocated), layer->expert_bytes });
    }
    split_ = config.adaptive && inner_is_host_ ? slot_split(sizes) : slot_split();
}

void pool::move_a_slot(ggml_backend_t inner) {
    slot_split::move its;
    if (!split_.propose(its)) {
        return;
    }
    paged_layer & from = *layers_[its.from];
    paged_layer & to   = *layers_[its.to];
    settle(from, false);
    if (!from.table->reserved().empty()) {
        return; // next time
    }
    ggml_backend_synchronize(inner);
    for (int32_t i = 0; i < its.n; i++) {
        const rotary_load moved = from.table->shrink();
        const int32_t     last  = from.table->n_slots();
        for (const paged_tensor * tensor : from.tensors) {
            char * slots = (char *) tensor->slots->data;
            if (moved.expert >= 0) {
                memcpy(slots + tensor->slots->nb[2] * moved.slot, slots + tensor->slots->nb[2] * last,
                       tensor->expert_bytes);
            }
        }
        give_back(from, last, last + 1);
    }
    to.table->resize(to.table->n_slots() + 1);
    split_.moved(its);

    const std::lock_guard<std::mutex> lock(counter_mutex_);
    for (paged_layer * each : { &from, &to }) {
        each->stats.n_slots    = each->table->n_slots();
        each->stats.n_resident = each->table->n_resident();
    }
    totals_.slot_bytes += to.expert_bytes;
    totals_.slot_bytes -= from.expert_bytes * its.n;
    totals_.slot_moves++;
}

void pool::follow_memory() {
    static constexpr uint64_t interval_us = 250 * 1000;
    static constexpr double   too_much    = 20.0; // percent of time waiting for memory

    if (!inner_is_host_ || now_us() - memory_seen_us_ < interval_us || status_ != ROTARY_OK ||
        std::none_of(layers_.begin(), layers_.end(), [](const auto & layer) { return layer->table != nullptr; })) {
        return;
    }
    memory_seen_us_ = now_us();

    const host_memory memory = host_memory_now();
    const uint64_t    margin = margin_bytes(memory.total);
    const uint64_t    now    = totals_.slot_bytes + split_.spare();
    uint64_t          wanted = now;
    // Between half of the margin and one and a half nothing changes, so that sizes do not swing.
    if (memory.available < margin / 2 || (memory.available < margin && host_memory_pressure() > too_much)) {
        const uint64_t lack = margin - memory.available;
        wanted              = std::max(budget_min_bytes(layer_sizes()), now > lack ? now - lack : 0);
    } else if (direct_ && now < most_slot_bytes_ && memory.available > margin + margin / 2 &&
               memory_seen_us_ > growth_tried_us_ + 20 * interval_us) { // it costs milliseconds to find out
        growth_tried_us_    = memory_seen_us_;
        const uint64_t more = free_bytes();
        wanted              = std::min(now + (more > margin / 2 ? more : 0), most_slot_bytes_);
    }
    if (wanted == now) {
        return;
    }
    resize(wanted);
    if (totals_.slot_bytes < now) {
        uint64_t n_shrinks;
        {
            const std::lock_guard<std::mutex> lock(counter_mutex_);
            n_shrinks = ++totals_.shrinks;
        }
        const std::string text =
            format("%s: memory runs short, %s are available: slots shrink from %s to %s", config.model.c_str(),
                   mib(memory.available).c_str(), mib(now).c_str(), mib(totals_.slot_bytes).c_str());
        if (n_shrinks == 1) {
            notice(text);
        } else {
            GGML_LOG_WARN("rotary: %s\n", text.c_str());
        }
    }
    if (config.wanted.what == budget::kind::automatic) {
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        totals_.budget_bytes = totals_.slot_bytes;
    }
}

} // namespace rotary
