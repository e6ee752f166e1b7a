// SPDX-License-Identifier: MIT
//
// ROTARY device: the vtable that ggml and llama.cpp call. It answers as the inner device does, except about its
// identity, free memory and where expert matrices go.

#include "ggml/device.hpp"

#include "base/error.hpp"
#include "base/inner_device.hpp"
#include "store/loaded_weights.hpp"

#include <algorithm>
#include <cstring>

namespace rotary {

static device & self(ggml_backend_dev_t dev) {
    return *(device *) dev->context;
}

static const char * device_get_name(ggml_backend_dev_t dev) {
    return self(dev).name().c_str();
}

static const char * device_get_description(ggml_backend_dev_t dev) {
    return self(dev).description().c_str();
}

static void device_get_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    ggml_backend_dev_memory(self(dev).inner(), free, total);
    // A GPU counts slots as used; the CPU backend reports all memory as free, so they are subtracted.
    if (inner_has_host_memory(self(dev).inner())) {
        *free -= std::min<size_t>(*free, self(dev).slot_bytes());
    }
}

static enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_get_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props * props) {
    // Keeps the inner device's id, so that llama.cpp uses one of the two devices, not both.
    ggml_backend_dev_get_props(self(dev).inner(), props);
    props->name        = device_get_name(dev);
    props->description = device_get_description(dev);
    props->type        = device_get_type(dev);
    // Otherwise llama.cpp would read all experts into memory over an inner device that gains nothing from mapping.
    props->caps.mmap_support = true;
    device_get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    return guarded((ggml_backend_t) nullptr, [&] { return backend_new(self(dev)); });
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t dev) {
    return ggml_backend_dev_buffer_type(self(dev).inner());
}

static ggml_backend_buffer_type_t device_get_host_buffer_type(ggml_backend_dev_t dev) {
    return ggml_backend_dev_host_buffer_type(self(dev).inner());
}

static ggml_backend_buffer_t device_buffer_from_host_ptr(ggml_backend_dev_t dev, void * ptr, size_t size,
                                                         size_t max_tensor_size) {
    return ggml_backend_dev_buffer_from_host_ptr(self(dev).inner(), ptr, size, max_tensor_size);
}

static bool is_view_op(ggml_op op) {
    return op == GGML_OP_NONE || op == GGML_OP_RESHAPE || op == GGML_OP_VIEW || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE;
}

// Whether a weight is worth paging: matrices of several experts. The loader also asks about 1-D scales with this op.
static bool is_expert_matrix(const ggml_tensor * weight) {
    return weight->ne[1] > 1 && weight->ne[2] > 1 && weight->ne[3] == 1 && ggml_is_contiguous(weight);
}

static bool supports_paged(device & dev, const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT_ID && is_expert_matrix(op->src[0]) && op->src[1]->type == GGML_TYPE_F32 &&
           inner_supports_expert_matrix(dev.inner(), ggml_backend_dev_buffer_type(dev.inner()), op->src[0]->type,
                                        op->src[0]->ne);
}

// The loader asks whether a weight may lie in a buffer type by giving it an empty buffer of that type. It tries the
// default type first and takes the first that is accepted, so refusing one sends the weight on to a better one.
static bool loader_supports_op(device & dev, const ggml_tensor * op, ggml_backend_buffer_type_t buft) {
    ggml_tensor * weight = op->src[0];
    if (op->op == GGML_OP_MUL_MAT_ID && dev.paging() && supports_paged(dev, op)) {
        dev.remember_n_expert_used(weight->name, (int32_t) op->src[2]->ne[0]);
        return buft == dev.paged_buft();
    }
    if (buft == dev.paged_buft()) {
        if (op->op == GGML_OP_MUL_MAT_ID && dev.paging() && is_expert_matrix(weight)) {
            dev.collecting_pool()->model.notices.say(
                format("%s: %s cannot multiply expert matrices of type %s; they are not paged", weight->name,
                       dev.inner_name().c_str(), ggml_type_name(weight->type)));
        }
        return false;
    }
    const std::vector<ggml_backend_buffer_type_t> extra    = inner_extra_bufts(dev.inner());
    const bool                                    is_extra = std::find(extra.begin(), extra.end(), buft) != extra.end();
    if (is_extra && !dev.repack()) {
        return false;
    }
    if ((op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) && !is_extra && dev.repack()) {
        for (ggml_backend_buffer_type_t better : extra) {
            if (inner_supports_weight_in(dev.inner(), better, op)) {
                return false;
            }
        }
    }
    const bool accepted = ggml_backend_dev_supports_op(dev.inner(), op);
    if (accepted) {
        // Embeddings are also read row by row from the mapping, so they do not count as copied out of it.
        note_weight(weight->name,
                    (is_extra || !ggml_backend_buft_is_host(buft)) && strstr(weight->name, "token_embd") == nullptr);
    }
    return accepted;
}

static bool device_supports_op(ggml_backend_dev_t dev, const struct ggml_tensor * op) {
    const ggml_tensor * weight = op->src[0];
    if (weight != nullptr && weight->buffer != nullptr) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(weight->buffer);
        if (ggml_backend_buffer_get_size(weight->buffer) == 0 && weight->op == GGML_OP_NONE) {
            if (is_view_op(op->op)) {
                return true;
            }
            try {
                return loader_supports_op(self(dev), op, buft);
            } catch (...) { // a refusal alone would leave the weight unpaged, silently
                fail_by_exception();
                self(dev).count_lost_model();
                return false;
            }
        }
        if (buft == self(dev).paged_buft()) {
            return is_view_op(op->op) || supports_paged(self(dev), op);
        }
    }
    return ggml_backend_dev_supports_op(self(dev).inner(), op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == self(dev).paged_buft() || ggml_backend_dev_supports_buft(self(dev).inner(), buft);
}

static bool device_offload_op(ggml_backend_dev_t dev, const struct ggml_tensor * op) {
    return ggml_backend_dev_offload_op(self(dev).inner(), op);
}

// Events are the inner device's, and name it in their device field: ggml calls it directly to wait for them.
static ggml_backend_event_t device_event_new(ggml_backend_dev_t dev) {
    return ggml_backend_event_new(self(dev).inner());
}

static void device_event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    ggml_backend_event_free(event);
}

static void device_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) {
    ggml_backend_event_synchronize(event);
}

const ggml_backend_device_i device_i = {
    /* .get_name             = */ device_get_name,
    /* .get_description      = */ device_get_description,
    /* .get_memory           = */ device_get_memory,
    /* .get_type             = */ device_get_type,
    /* .get_props            = */ device_get_props,
    /* .init_backend         = */ device_init_backend,
    /* .get_buffer_type      = */ device_get_buffer_type,
    /* .get_host_buffer_type = */ device_get_host_buffer_type,
    /* .buffer_from_host_ptr = */ device_buffer_from_host_ptr,
    /* .supports_op          = */ device_supports_op,
    /* .supports_buft        = */ device_supports_buft,
    /* .offload_op           = */ device_offload_op,
    /* .event_new            = */ device_event_new,
    /* .event_free           = */ device_event_free,
    /* .event_synchronize    = */ device_event_synchronize,
};

} // namespace rotary
