// SPDX-License-Identifier: MIT
//
// Statistics. See statistics.hpp.

#include "stats/statistics.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <utility>

namespace rotary {

void statistics::set_layers(std::vector<rotary_layer_stats> layers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    layers_ = std::move(layers);
}

void statistics::set_slots(int32_t index, int32_t n_slots, int32_t n_resident) {
    const std::lock_guard<std::mutex> lock(mutex_);
    layers_[index].n_slots    = n_slots;
    layers_[index].n_resident = n_resident;
}

void statistics::set_scratch_bytes(uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    scratch_bytes_ = bytes;
}

// `sum` is a layer's counters, or the pool's.
template <typename counters> static void add(counters & sum, const rotary_layer_stats & more) {
    sum.lookups += more.lookups;
    sum.requests += more.requests;
    sum.hits += more.hits;
    sum.misses += more.misses;
    sum.bypassed += more.bypassed;
    sum.evictions += more.evictions;
    sum.bytes_paged += more.bytes_paged;
    sum.waves += more.waves;
}

void statistics::count_lookup(int32_t index, const rotary_layer_stats & delta, int32_t n_resident) {
    const std::lock_guard<std::mutex> lock(mutex_);
    add(layers_[index], delta);
    layers_[index].n_resident = n_resident;
}

rotary_stats statistics::all() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    rotary_stats                      out = totals_;
    out.n_layers                          = (int32_t) layers_.size();
    out.staging_bytes += scratch_bytes_;
    for (const rotary_layer_stats & layer : layers_) {
        out.n_expert      = std::max(out.n_expert, layer.n_expert);
        out.n_expert_used = std::max(out.n_expert_used, layer.n_expert_used);
        out.n_slots       = out.n_slots ? std::min(out.n_slots, layer.n_slots) : layer.n_slots;
        out.path          = out.path ? std::min(out.path, layer.path) : layer.path;
        add(out, layer);
    }
    return out;
}

bool statistics::layer(int32_t index, rotary_layer_stats & out) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (index < 0 || index >= (int32_t) layers_.size()) {
        return false;
    }
    out = layers_[index];
    return true;
}

// All fields from `lookups` on are counters.
template <typename figures> static void clear_counters(figures & all) {
    memset((char *) &all + offsetof(figures, lookups), 0, sizeof(all) - offsetof(figures, lookups));
}

void statistics::reset() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::for_each(layers_.begin(), layers_.end(), clear_counters<rotary_layer_stats>);
    clear_counters(totals_);
    was_reset_ = true;
}

bool statistics::take_reset() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(was_reset_, false);
}

void statistics::print(const std::string & model, const char * inner) const {
    const rotary_stats s = all();
    fprintf(stderr,
            "rotary: model=%s inner=%s budget_bytes=%llu n_layers=%d n_expert=%d n_slots=%d path=%d lookups=%llu "
            "requests=%llu hits=%llu misses=%llu bypassed=%llu evictions=%llu bytes_paged=%llu waves=%llu waits=%llu "
            "store=%d bytes_read=%llu prefetched=%llu prefetch_used=%llu\n",
            model.c_str(), inner, (unsigned long long) s.budget_bytes, s.n_layers, s.n_expert, s.n_slots, s.path,
            (unsigned long long) s.lookups, (unsigned long long) s.requests, (unsigned long long) s.hits,
            (unsigned long long) s.misses, (unsigned long long) s.bypassed, (unsigned long long) s.evictions,
            (unsigned long long) s.bytes_paged, (unsigned long long) s.waves, (unsigned long long) s.waits, s.store,
            (unsigned long long) s.bytes_read, (unsigned long long) s.prefetched, (unsigned long long) s.prefetch_used);
}

} // namespace rotary
