// SPDX-License-Identifier: MIT
//
// ROTARY_PAGED: the buffer type of expert weights. Over an mmapped file nothing is copied: the buffer is the mapping.
// Without mmap it is plain host memory that the loader fills. Either way its experts go to the collecting pool.

#include "base/error.hpp"
#include "ggml/device.hpp"

#include "ggml-impl.h"

#include <cstring>
#include <memory>

namespace rotary {

struct paged_buffer {
    device &              dev;
    std::shared_ptr<pool> owner;
    char *                base;
    bool                  owns_memory;
    bool                  lost = false; // memory ran out while adding its tensors; the pool has been told
};

static paged_buffer & self(ggml_backend_buffer_t buffer) {
    return *(paged_buffer *) buffer->context;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    paged_buffer & paged = self(buffer);
    guarded(false, [&] {
        paged.owner->remove_owner(buffer);
        return true;
    });
    paged.owner->count_lost_models(paged.lost ? -1 : 0);
    paged.dev.add_user(-1);
    if (paged.owns_memory) {
        ggml_aligned_free(paged.base, buffer->size);
    }
    delete &paged;
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return self(buffer).base;
}

static enum ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor * tensor) {
    if (tensor->view_src == nullptr && tensor->ne[2] > 1) {
        paged_buffer & paged = self(buffer);
        const bool     known = guarded(false, [&] {
            paged.owner->add_tensor(buffer, tensor, paged.dev.n_expert_used(tensor->name), !paged.owns_memory);
            return true;
        });
        if (!known && !paged.lost) { // the loader ignores the status, so the pool has to refuse to run
            paged.lost = true;
            paged.owner->count_lost_models(1);
        }
        return known ? GGML_STATUS_SUCCESS : GGML_STATUS_ALLOC_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

static void buffer_memset_tensor(ggml_backend_buffer_t, struct ggml_tensor * tensor, uint8_t value, size_t offset,
                                 size_t size) {
    memset((char *) tensor->data + offset, value, size);
}

static void buffer_set_tensor(ggml_backend_buffer_t, struct ggml_tensor * tensor, const void * data, size_t offset,
                              size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor * tensor, void * data,
                              size_t offset, size_t size) {
    if (!guarded(false, [&] { return self(buffer).owner->copy_out(tensor, data, offset, size); })) {
        memset(data, 0, size); // ggml takes no status here; the error is in the log
    }
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    if (self(buffer).owns_memory) { // a mapping is read-only
        memset(self(buffer).base, value, buffer->size);
    }
}

static const ggml_backend_buffer_i paged_buffer_i = {
    /* .free_buffer   = */ buffer_free,
    /* .get_base      = */ buffer_get_base,
    /* .init_tensor   = */ buffer_init_tensor,
    /* .memset_tensor = */ buffer_memset_tensor,
    /* .set_tensor    = */ buffer_set_tensor,
    /* .get_tensor    = */ buffer_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ buffer_clear,
    /* .reset         = */ nullptr,
};

static ggml_backend_buffer_t paged_buffer_new(device & dev, void * base, size_t size, bool owns_memory) {
    return guarded((ggml_backend_buffer_t) nullptr, [&] {
        auto paged =
            std::make_unique<paged_buffer>(paged_buffer{ dev, dev.collecting_pool(), (char *) base, owns_memory });
        const ggml_backend_buffer_t buffer =
            ggml_backend_buffer_init(dev.paged_buft(), paged_buffer_i, paged.get(), size);
        dev.add_user(1);
        paged.release();
        return buffer;
    });
}

std::shared_ptr<pool> paged_pool_of(const ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    if (buffer == nullptr || buffer->iface.free_buffer != buffer_free) {
        return nullptr;
    }
    return self(buffer).owner;
}

// buffer type

static const char * paged_buft_name(ggml_backend_buffer_type_t buft) {
    return ((device *) buft->context)->paged_name().c_str();
}

static ggml_backend_buffer_t paged_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    void *                base = ggml_aligned_malloc(size);
    ggml_backend_buffer_t buffer =
        base != nullptr ? paged_buffer_new(*(device *) buft->context, base, size, true) : nullptr;
    if (buffer == nullptr && base != nullptr) {
        ggml_aligned_free(base, size);
    }
    return buffer;
}

static size_t paged_buft_get_alignment(ggml_backend_buffer_type_t) {
    return TENSOR_ALIGNMENT;
}

static bool paged_buft_is_host(ggml_backend_buffer_type_t) {
    return true;
}

const ggml_backend_buffer_type_i paged_buft_i = {
    /* .get_name       = */ paged_buft_name,
    /* .alloc_buffer   = */ paged_buft_alloc_buffer,
    /* .get_alignment  = */ paged_buft_get_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ paged_buft_is_host,
};

// The buffer type's private device. llama.cpp maps weights in place only for the default buffer type of a device that
// can wrap host memory, and ROTARY_PAGED cannot be the default of the ROTARY device itself.

static const char * paged_device_get_name(ggml_backend_dev_t dev) {
    return ((device *) dev->context)->paged_name().c_str();
}

static void paged_device_get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = 0;
}

static enum ggml_backend_dev_type paged_device_get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static void paged_device_get_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props * props) {
    props->name        = paged_device_get_name(dev);
    props->description = paged_device_get_name(dev);
    props->type        = paged_device_get_type(dev);
    props->caps        = { /* .async                = */ false,
                           /* .host_buffer          = */ false,
                           /* .buffer_from_host_ptr = */ true,
                           /* .events               = */ false,
                           /* .mmap_support         = */ true };
}

static ggml_backend_t paged_device_init_backend(ggml_backend_dev_t, const char *) {
    return nullptr;
}

static ggml_backend_buffer_type_t paged_device_get_buffer_type(ggml_backend_dev_t dev) {
    return ((device *) dev->context)->paged_buft();
}

static ggml_backend_buffer_t paged_device_buffer_from_host_ptr(ggml_backend_dev_t dev, void * ptr, size_t size,
                                                               size_t) {
    return paged_buffer_new(*(device *) dev->context, ptr, size, false);
}

static bool paged_device_supports_op(ggml_backend_dev_t, const struct ggml_tensor *) {
    return false;
}

static bool paged_device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == paged_device_get_buffer_type(dev);
}

const ggml_backend_device_i paged_device_i = {
    /* .get_name             = */ paged_device_get_name,
    /* .get_description      = */ paged_device_get_name,
    /* .get_memory           = */ paged_device_get_memory,
    /* .get_type             = */ paged_device_get_type,
    /* .get_props            = */ paged_device_get_props,
    /* .init_backend         = */ paged_device_init_backend,
    /* .get_buffer_type      = */ paged_device_get_buffer_type,
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ paged_device_buffer_from_host_ptr,
    /* .supports_op          = */ paged_device_supports_op,
    /* .supports_buft        = */ paged_device_supports_buft,
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ nullptr,
    /* .event_free           = */ nullptr,
    /* .event_synchronize    = */ nullptr,
};

} // namespace rotary
