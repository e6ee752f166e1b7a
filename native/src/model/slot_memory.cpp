// SPDX-License-Identifier: MIT
//
// Slot memory. See slot_memory.hpp.

#include "model/slot_memory.hpp"

#include "base/inner_device.hpp"
#include "base/memory.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <sys/mman.h>
#include <unistd.h>

namespace rotary {

slot_memory::slot_memory(ggml_backend_dev_t inner, bool repack) :
    inner_(inner), inner_is_host_(inner_has_host_memory(inner)), repack_(repack) {}

ggml_backend_buffer_type_t slot_memory::layout_of(const paged_tensor & tensor) const {
    if (repack_) {
        for (ggml_backend_buffer_type_t buft : inner_extra_bufts(inner_)) {
            if (inner_supports_expert_matrix(inner_, buft, tensor.type, tensor.ne)) {
                return buft;
            }
        }
    }
    return ggml_backend_dev_buffer_type(inner_);
}

bool slot_memory::is_plain(const paged_tensor & tensor) const {
    return layout_of(tensor) == ggml_backend_dev_buffer_type(inner_);
}

bool slot_memory::allocate(const catalogue & experts) {
    free();
    std::map<ggml_backend_buffer_type_t, ggml_context *> by_layout;
    bool                                                 read_targets = false;
    for (const auto & layer : experts.layers()) {
        read_targets = read_targets || (inner_is_host_ && layer->uses_direct_io());
        for (paged_tensor * tensor : layer->tensors) {
            tensor->slots = nullptr;
            if (layer->path == ROTARY_PATH_MAPPED) {
                continue;
            }
            ggml_context *& ctx = by_layout[layout_of(*tensor)];
            if (ctx == nullptr) {
                contexts_.emplace_back(ggml_init({ ggml_tensor_overhead() * experts.tensors().size(), nullptr, true }));
                ctx = contexts_.back().get();
            }
            tensor->slots = ggml_new_tensor_3d(ctx, tensor->type, tensor->ne[0], tensor->ne[1], layer->n_allocated);
            ggml_format_name(tensor->slots, "%s (slots)", tensor->name.c_str());
            if (layer->reads_into_slots && tensor->direct_io && tensor->offset % tensor->file->alignment() != 0) {
                // The first and last sector of an expert also hold bytes of its neighbours in the file.
                tensor->slots->nb[2] += tensor->file->alignment();
                tensor->slots->nb[3] = tensor->slots->nb[2] * layer->n_allocated;
            }
        }
    }
    for (const auto & [buft, ctx] : by_layout) {
        const bool            plain  = buft == ggml_backend_dev_buffer_type(inner_);
        ggml_backend_buffer_t buffer = read_targets && plain ? allocate_read_targets(experts, buft)
                                                             : ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (buffer == nullptr) {
            free();
            return false;
        }
        buffers_.emplace_back(buffer);
        if (inner_is_host_) {
            char * base = (char *) ggml_backend_buffer_get_base(buffer);
            known_.push_back(host_memory_of_slots({ base, base + ggml_backend_buffer_get_size(buffer) }));
        } else {
            // A GPU kernel may read past an expert's end into the next slot and multiply by zero: no NaN may be there.
            ggml_backend_buffer_clear(buffer, 0);
        }
    }
    return true;
}

// Slots lie at their experts' file offset modulo the file's alignment, with room for a sector around a tensor's slots.
ggml_backend_buffer_t slot_memory::allocate_read_targets(const catalogue &          experts,
                                                         ggml_backend_buffer_type_t buft) const {
    std::vector<paged_tensor *> placed;
    size_t                      size     = 0;
    const auto                  align_of = [&](const paged_tensor * tensor) {
        return std::max(tensor->direct_io ? tensor->file->alignment() : 1, ggml_backend_buft_get_alignment(buft));
    };
    for (const auto & tensor : experts.tensors()) {
        if (tensor->slots != nullptr && layout_of(*tensor) == buft) {
            placed.push_back(tensor.get());
            size += tensor->slots->nb[3] + 3 * align_of(tensor.get());
        }
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, size);
    if (buffer != nullptr) {
        auto at = (uintptr_t) ggml_backend_buffer_get_base(buffer);
        for (const paged_tensor * tensor : placed) {
            const size_t align = align_of(tensor);
            at                 = (at + align - 1) / align * align;
            at += tensor->direct_io ? tensor->offset % tensor->file->alignment() : 0;
            ggml_backend_tensor_alloc(buffer, tensor->slots, (void *) at);
            at += tensor->slots->nb[3] + align;
        }
    }
    return buffer;
}

void slot_memory::free() {
    generation_++;
    known_.clear();
    buffers_.clear();
    contexts_.clear();
}

// ---- in host memory

void slot_memory::touch(const paged_layer & layer, int32_t first, int32_t last) const {
    for (const paged_tensor * tensor : layer.tensors) {
        memset((char *) tensor->slots->data + tensor->slots->nb[2] * first, 0, tensor->slots->nb[2] * (last - first));
    }
}

// Only whole pages: the first and the last may hold parts of other slots.
void slot_memory::give_back(const paged_layer & layer, int32_t first, int32_t last) const {
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (const paged_tensor * tensor : layer.tensors) {
        const auto begin = ((uintptr_t) tensor->slots->data + tensor->slots->nb[2] * first + page - 1) / page * page;
        const auto end   = ((uintptr_t) tensor->slots->data + tensor->slots->nb[2] * last) / page * page;
        if (begin < end) {
            madvise((void *) begin, end - begin, MADV_DONTNEED);
        }
    }
}

void slot_memory::copy(const paged_layer & layer, int32_t from, int32_t to) const {
    for (const paged_tensor * tensor : layer.tensors) {
        char * slots = (char *) tensor->slots->data;
        memcpy(slots + tensor->slots->nb[2] * to, slots + tensor->slots->nb[2] * from, tensor->expert_bytes);
    }
}

} // namespace rotary
