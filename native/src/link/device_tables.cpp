// SPDX-License-Identifier: MIT
//
// Device tables. See device_tables.hpp.

#include "link/device_tables.hpp"

#include "base/error.hpp"

#include <algorithm>

namespace rotary {

static size_t padded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

bool device_tables::allocate(link * over, const std::vector<layer> & layers, std::string & reason) {
    free();
    link_ = over;
    for (const layer & each : layers) {
        states_.push_back({ each });
    }
    size_t  bytes      = padded(sizeof(rotary_page_state) * layers.size());
    int64_t max_embd   = 0;
    int32_t max_expert = 0;
    for (layer_state & state : states_) {
        const layer & about    = state.about;
        const bool    readable = std::all_of(about.tensors.begin(), about.tensors.end(),
                                             [](const auto & tensor) { return tensor.store != nullptr; });
        if (over == nullptr || about.slots == nullptr || !readable || about.tensors.size() > ROTARY_LINK_MAX_TENSORS) {
            continue;
        }
        state.offset = bytes;
        bytes += padded(rotary_page_table_bytes(about.n_expert, about.slots->n_slots()));
        bytes += padded(sizeof(float) * about.max_embd);
        max_embd   = std::max(max_embd, about.max_embd);
        max_expert = std::max(max_expert, about.n_expert);
        n_tables_++;
    }
    const size_t copy_at   = bytes;
    const size_t scores_at = copy_at + padded(sizeof(float) * max_embd * ROTARY_PAGE_MAX_TOKENS);
    bytes                  = scores_at + padded(sizeof(float) * max_expert * ROTARY_PAGE_MAX_TOKENS);
    if (n_tables_ == 0) {
        return true;
    }
    context_.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    memory_ = ggml_new_tensor_1d(context_.get(), GGML_TYPE_I8, bytes);
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_dev_buffer_type(inner_)));
    counts_ = over->new_pinned(sizeof(rotary_page_state) * states_.size(), reason);
    if (!buffer_ || !counts_.memory) {
        for (layer_state & state : states_) {
            state.offset = 0;
        }
        n_tables_ = 0;
        return buffer_ != nullptr;
    }
    reason.clear();
    ggml_backend_buffer_clear(buffer_.get(), 0);
    std::fill_n((char *) counts_.memory.get(), sizeof(rotary_page_state) * states_.size(), '\0');
    take_memory((char *) memory_->data, copy_at, scores_at);
    return true;
}

// Point the lookups and predictions of all layers into the device's memory, which begins at `base`.
void device_tables::take_memory(char * base, size_t copy_at, size_t scores_at) {
    for (size_t i = 0; i < states_.size(); i++) {
        layer_state & state = states_[i];
        if (state.offset == 0) {
            continue;
        }
        rotary_link_layer & on_device = state.lookup.layer;
        int32_t             n_pieces  = 0;
        on_device.n_tensors           = (int32_t) state.about.tensors.size();
        for (size_t t = 0; t < state.about.tensors.size(); t++) {
            on_device.tensors[t] = state.about.tensors[t];
            n_pieces += rotary_link_n_pieces(on_device.tensors[t]);
        }
        on_device.table         = rotary_page_table_at(base + state.offset, (rotary_page_state *) (void *) base + i,
                                                       state.about.n_expert, state.about.slots->n_slots(), n_pieces);
        state.prediction.layer  = on_device;
        state.prediction.copy   = (float *) (void *) (base + copy_at);
        state.prediction.scores = (float *) (void *) (base + scores_at);
    }
}

void device_tables::free() {
    states_.clear();
    n_tables_ = 0;
    buffer_.reset();
    context_.reset();
    counts_ = {};
}

bool device_tables::resolves(int32_t layer, int64_t n_ids) const {
    return n_tables_ > 0 && states_[layer].offset != 0 && n_ids <= states_[layer].about.slots->n_slots();
}

bool device_tables::set_scale(int32_t layer, const std::vector<float> & scale) {
    layer_state & state = states_[layer];
    if ((int64_t) scale.size() > state.about.max_embd) {
        return false;
    }
    const size_t at =
        state.offset + padded(rotary_page_table_bytes(state.about.n_expert, state.about.slots->n_slots()));
    ggml_backend_tensor_set(memory_, scale.data(), at, sizeof(float) * scale.size());
    state.prediction.scale = (const float *) (const void *) ((const char *) memory_->data + at);
    return true;
}

// ---- tables between host and device

// A layer's state in host memory, followed by its table as the device lays it out.
static rotary_page_table image_of(std::vector<char> & image, const rotary_page_table & like) {
    image.resize(sizeof(rotary_page_state) + rotary_page_table_bytes(like.n_expert, like.n_slots));
    return rotary_page_table_at(image.data() + sizeof(rotary_page_state), (rotary_page_state *) (void *) image.data(),
                                like.n_expert, like.n_slots, like.n_pieces);
}

void device_tables::to_device(int32_t layer) {
    layer_state & state = states_[layer];
    if (state.on_device) {
        return;
    }
    std::vector<char>       image;
    const rotary_page_table table = image_of(image, state.lookup.layer.table);
    *table.state                  = state.counted;
    state.about.slots->save(table);
    ggml_backend_tensor_set(memory_, image.data() + sizeof(rotary_page_state), state.offset,
                            image.size() - sizeof(rotary_page_state));
    ggml_backend_tensor_set(memory_, image.data(), sizeof(rotary_page_state) * layer, sizeof(rotary_page_state));
    state.on_device = true;
}

bool device_tables::to_host(int32_t layer) {
    if (n_tables_ == 0 || !states_[layer].on_device) {
        return true;
    }
    if (!link_->synchronize()) {
        return false;
    }
    layer_state &           state = states_[layer];
    std::vector<char>       image;
    const rotary_page_table table = image_of(image, state.lookup.layer.table);
    ggml_backend_tensor_get(memory_, image.data() + sizeof(rotary_page_state), state.offset,
                            image.size() - sizeof(rotary_page_state));
    ggml_backend_tensor_get(memory_, image.data(), sizeof(rotary_page_state) * layer, sizeof(rotary_page_state));
    rotary_page_commit(rotary_page_alone{}, table, -1);
    if (!take_counts(state, *table.state)) {
        return false;
    }
    state.about.slots->load(table);
    state.on_device        = false;
    state.lookup.predicted = false;
    return true;
}

void device_tables::forget() {
    for (layer_state & state : states_) {
        state.on_device        = false;
        state.lookup.predicted = false;
    }
}

// ---- counters

bool device_tables::send_counts() {
    return link_->copy(counts_.memory.get(), memory_->data, sizeof(rotary_page_state) * states_.size());
}

bool device_tables::take_counts() {
    const auto * now = (const rotary_page_state *) counts_.memory.get();
    for (size_t i = 0; i < states_.size(); i++) {
        // The counts of a predicted layer still change: its lookup has not come yet.
        if (states_[i].on_device && !states_[i].lookup.predicted && !take_counts(states_[i], now[i])) {
            return false;
        }
    }
    return true;
}

bool device_tables::take_counts(layer_state & state, const rotary_page_state & now) {
    if (now.refused != 0) {
        fail(ROTARY_ERR_ARG, format("%s: layer %d routed to an expert that it does not have; the graph is broken",
                                    model_.c_str(), state.about.il));
        return false;
    }
    const rotary_page_state & before   = state.counted;
    const uint64_t            misses   = now.misses - before.misses;
    const uint64_t            unused   = now.pieces_unused - before.pieces_unused;
    const int32_t             n_pieces = state.lookup.layer.table.n_pieces;
    stats_.update_layer((int32_t) (&state - states_.data()), [&](rotary_stats & totals, rotary_layer_stats & layer) {
        layer.lookups += now.lookups - before.lookups;
        layer.requests += now.requests - before.requests;
        layer.misses += misses;
        layer.hits += now.requests - before.requests - misses;
        layer.evictions += now.evictions - before.evictions;
        layer.bytes_paged += misses * state.about.expert_bytes + unused * state.about.expert_bytes / n_pieces;
        layer.n_resident = now.n_resident;
        totals.device_lookups += now.lookups - before.lookups;
        totals.predicted += now.predicted - before.predicted;
        totals.predicted_right += now.predicted_right - before.predicted_right;
        totals.prefetched += now.prefetched - before.prefetched;
        totals.prefetch_used += now.prefetch_used - before.prefetch_used;
        totals.late_hits += now.late_hits - before.late_hits;
    });
    state.counted = now;
    return true;
}

} // namespace rotary
