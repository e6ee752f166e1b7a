// SPDX-License-Identifier: MIT
//
// Lookup memory. See lookup_memory.hpp.

#include "model/lookup_memory.hpp"

namespace rotary {

void lookup_memory::set_layers(size_t n_layers) {
    layers_.assign(n_layers, {});
}

void lookup_memory::free() {
    generation_++;
    buffer_.reset();
    context_.reset();
    capacity_ = 0;
    layers_.clear();
    scratch_.reset();
    stats_.set_scratch_bytes(0);
}

ggml_tensor * lookup_memory::slot_ids(int32_t layer, int64_t n_ids, int64_t n_tokens) {
    if (n_ids * n_tokens > capacity_) {
        const int64_t capacity = GGML_PAD(n_ids * n_tokens, 1024);
        generation_++;
        buffer_.reset();
        context_.reset(ggml_init({ ggml_tensor_overhead() * layers_.size(), nullptr, true }));
        for (layer_ids & each : layers_) {
            each.on_device = ggml_new_tensor_2d(context_.get(), GGML_TYPE_I32, capacity, 1);
        }
        buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_dev_buffer_type(inner_)));
        capacity_ = buffer_ ? capacity : 0;
        if (!buffer_) {
            return nullptr;
        }
    }
    ggml_tensor * ids = layers_[layer].on_device;
    ids->ne[0]        = n_ids;
    ids->ne[1]        = n_tokens;
    ids->nb[1]        = n_ids * sizeof(int32_t);
    ids->nb[2] = ids->nb[3] = ids->nb[1] * n_tokens;
    return ids;
}

bool lookup_memory::place_in_scratch(ggml_backend_t user, std::initializer_list<ggml_tensor *> tensors) {
    ggml_backend_buffer_type_t buft  = ggml_backend_dev_buffer_type(inner_);
    const size_t               align = ggml_backend_buft_get_alignment(buft);
    size_t                     bytes = align;
    for (const ggml_tensor * each : tensors) {
        bytes += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, each), align);
    }
    if (!scratch_ || ggml_backend_buffer_get_size(scratch_.get()) < bytes) {
        ggml_backend_synchronize(user); // its last wave may still use the scratch memory
        scratch_.reset();
        scratch_.reset(ggml_backend_buft_alloc_buffer(buft, bytes));
        stats_.set_scratch_bytes(scratch_ ? bytes : 0);
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
