// SPDX-License-Identifier: MIT
//
// Pool: what it counts and says of itself. See pool.hpp.

#include "pool/pool.hpp"

#include "base/error.hpp"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

namespace rotary {

void pool::count(paged_layer & layer, const rotary_layer_stats & delta) {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    rotary_layer_stats &              stats = layer.stats;
    stats.lookups += delta.lookups;
    stats.requests += delta.requests;
    stats.hits += delta.hits;
    stats.misses += delta.misses;
    stats.bypassed += delta.bypassed;
    stats.evictions += delta.evictions;
    stats.bytes_paged += delta.bytes_paged;
    stats.waves += delta.waves;
    stats.n_resident = layer.table ? layer.table->n_resident() : layer.n_expert;
}

void pool::count_wait(uint64_t us) {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.waits++;
    totals_.wait_us += us;
}

void pool::count_ram_hits(uint64_t n) {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.ram_hits += n;
}

void pool::count_page(uint64_t us) {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.page_us += us;
}

void pool::count_prefetch(const rotary_stats & delta) {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    totals_.predicted += delta.predicted;
    totals_.predicted_right += delta.predicted_right;
    totals_.prefetch_used += delta.prefetch_used;
    totals_.late_hits += delta.late_hits;
}

void pool::count_reads() {
    if (!direct_) {
        return;
    }
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    if (reset_direct_) {
        direct_->reset_counters();
        reset_direct_ = false;
    }
    const direct_store::counters & its = direct_->counted();
    totals_.reads                      = its.reads;
    totals_.bytes_read                 = its.bytes_read;
    totals_.bytes_in_place             = its.bytes_in_place;
    totals_.read_us                    = its.read_us;
    totals_.stall_us                   = its.stall_us;
    totals_.prefetched                 = its.prefetched;
}

// ---- trace

void pool::trace(bool on) {
    {
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        tracing_ = on;
        if (on) {
            trace_.clear();
            n_untraced_ = 0;
        }
    }
    if (on && has_experts_on_device()) {
        notice(format("%s: while routings are recorded, the host resolves lookups, not %s; that is slower",
                      config.model.c_str(), ggml_backend_dev_name(inner_)));
    }
}

void pool::record(const paged_layer & layer, const std::vector<int32_t> & ids, const std::vector<float> & weights,
                  int64_t n_used) {
    static constexpr size_t most = 64u << 20; // bytes, if nobody reads them

    const std::lock_guard<std::mutex> lock(counter_mutex_);
    if ((trace_.size() + 3 * ids.size() + 4) * sizeof(int32_t) > most) {
        n_untraced_++;
        return;
    }
    trace_.insert(trace_.end(), { layer.il, (int32_t) (ids.size() / n_used), (int32_t) n_used, !weights.empty() });
    trace_.insert(trace_.end(), ids.begin(), ids.end());
    for (size_t i = 0; i < ids.size(); i++) {
        int32_t bits = 0;
        memcpy(&bits, weights.empty() ? (const void *) &bits : &weights[i], sizeof(bits));
        trace_.push_back(bits);
    }
    for (const int32_t expert : ids) {
        trace_.push_back(!layer.table || layer.table->slot_of(expert) >= 0);
    }
}

int64_t pool::read_trace(int32_t * records, int64_t n, uint64_t & n_untraced) {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    const auto                        there = (int64_t) trace_.size();
    n_untraced                              = n_untraced_;
    if (n >= there) {
        std::copy(trace_.begin(), trace_.end(), records);
        trace_.clear();
    }
    return there;
}

void pool::notice(const std::string & text) {
    {
        const std::lock_guard<std::mutex> lock(counter_mutex_);
        if (std::find(notices_.begin(), notices_.end(), text) != notices_.end()) {
            return;
        }
        notices_.push_back(text);
    }
    GGML_LOG_WARN("rotary: %s\n", text.c_str()); // a log callback may ask for the figures
}

void pool::stats(rotary_stats & out) const {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    out          = totals_;
    out.n_layers = (int32_t) layers_.size();
    out.staging_bytes += scratch_bytes_;
    out.ram_bytes = ram_bytes_;
    out.n_notices = (int32_t) notices_.size();
    for (const auto & layer : layers_) {
        out.n_expert      = std::max(out.n_expert, layer->n_expert);
        out.n_expert_used = std::max(out.n_expert_used, layer->n_expert_used);
        out.n_slots       = out.n_slots ? std::min(out.n_slots, layer->stats.n_slots) : layer->stats.n_slots;
        out.path          = out.path ? std::min<int32_t>(out.path, layer->path) : layer->path;
        out.lookups += layer->stats.lookups;
        out.requests += layer->stats.requests;
        out.hits += layer->stats.hits;
        out.misses += layer->stats.misses;
        out.bypassed += layer->stats.bypassed;
        out.evictions += layer->stats.evictions;
        out.bytes_paged += layer->stats.bytes_paged;
        out.waves += layer->stats.waves;
    }
}

bool pool::layer_stats(int32_t index, rotary_layer_stats & out) const {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    if (index < 0 || index >= (int32_t) layers_.size()) {
        return false;
    }
    const paged_layer & layer = *layers_[index];
    out                       = layer.stats;
    out.il                    = layer.il;
    out.n_expert              = layer.n_expert;
    out.n_expert_used         = layer.n_expert_used;
    out.path                  = layer.path;
    out.expert_bytes          = layer.expert_bytes;
    return true;
}

void pool::reset_counters() {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    for (const auto & layer : layers_) {
        rotary_layer_stats & s = layer->stats; // but for its slots, which whoever runs a graph reads unguarded
        s.lookups = s.requests = s.hits = s.misses = s.bypassed = s.evictions = s.bytes_paged = s.waves = 0;
    }
    rotary_stats & t = totals_;
    t.slot_moves = t.ram_hits = t.device_lookups = t.waits = t.wait_us = t.page_us = t.reads = t.bytes_read =
        t.bytes_in_place = t.read_us = t.stall_us = t.shrinks = 0;
    t.predicted = t.predicted_right = t.prefetched = t.prefetch_used = t.late_hits = 0;
    reset_direct_                                                                  = true;
}

const char * pool::notice_text(int32_t index) const {
    const std::lock_guard<std::mutex> lock(counter_mutex_);
    return index >= 0 && index < (int32_t) notices_.size() ? notices_[index].c_str() : nullptr;
}

void pool::print_summary() const {
    rotary_stats s = {};
    stats(s);
    fprintf(stderr,
            "rotary: model=%s inner=%s budget_bytes=%llu n_layers=%d n_expert=%d n_slots=%d path=%d lookups=%llu "
            "requests=%llu hits=%llu misses=%llu bypassed=%llu evictions=%llu bytes_paged=%llu waves=%llu waits=%llu "
            "store=%d bytes_read=%llu prefetched=%llu prefetch_used=%llu\n",
            config.model.c_str(), ggml_backend_dev_name(inner_), (unsigned long long) s.budget_bytes, s.n_layers,
            s.n_expert, s.n_slots, s.path, (unsigned long long) s.lookups, (unsigned long long) s.requests,
            (unsigned long long) s.hits, (unsigned long long) s.misses, (unsigned long long) s.bypassed,
            (unsigned long long) s.evictions, (unsigned long long) s.bytes_paged, (unsigned long long) s.waves,
            (unsigned long long) s.waits, s.store, (unsigned long long) s.bytes_read, (unsigned long long) s.prefetched,
            (unsigned long long) s.prefetch_used);
}

} // namespace rotary
