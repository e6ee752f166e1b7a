// SPDX-License-Identifier: MIT
//
// ROTARY backend (stream): the inner device's backend, with graphs run by the executor.

#include "exec/executor.hpp"
#include "ggml/device.hpp"

#include <memory>

namespace rotary {

struct backend {
    device &                  dev;
    ggml_backend_ptr          inner;
    std::unique_ptr<executor> exec;
    std::string               name;
};

static backend & self(ggml_backend_t handle) {
    return *(backend *) handle->context;
}

static bool is_rotary_backend(ggml_backend_t handle);

static ggml_backend_t unwrap(ggml_backend_t handle) {
    return is_rotary_backend(handle) ? self(handle).inner.get() : handle;
}

static const char * backend_get_name(ggml_backend_t handle) {
    return self(handle).name.c_str();
}

static void backend_free(ggml_backend_t handle) {
    self(handle).dev.add_user(-1);
    delete &self(handle);
    delete handle;
}

static void backend_set_tensor_async(ggml_backend_t handle, ggml_tensor * tensor, const void * data, size_t offset,
                                     size_t size) {
    ggml_backend_tensor_set_async(unwrap(handle), tensor, data, offset, size);
}

static void backend_get_tensor_async(ggml_backend_t handle, const ggml_tensor * tensor, void * data, size_t offset,
                                     size_t size) {
    ggml_backend_tensor_get_async(unwrap(handle), tensor, data, offset, size);
}

static void backend_set_tensor_2d_async(ggml_backend_t handle, ggml_tensor * tensor, const void * data, size_t offset,
                                        size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data) {
    ggml_backend_tensor_set_2d_async(unwrap(handle), tensor, data, offset, size, n_copies, stride_tensor, stride_data);
}

static void backend_get_tensor_2d_async(ggml_backend_t handle, const ggml_tensor * tensor, void * data, size_t offset,
                                        size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data) {
    ggml_backend_tensor_get_2d_async(unwrap(handle), tensor, data, offset, size, n_copies, stride_tensor, stride_data);
}

// The inner backend checks that both backends are of its kind, so ours are unwrapped.
static bool backend_cpy_tensor_async(ggml_backend_t src, ggml_backend_t dst, const ggml_tensor * from,
                                     ggml_tensor * to) {
    ggml_backend_t inner = unwrap(dst);
    return inner->iface.cpy_tensor_async != nullptr && inner->iface.cpy_tensor_async(unwrap(src), inner, from, to);
}

static void backend_synchronize(ggml_backend_t handle) {
    ggml_backend_synchronize(unwrap(handle));
}

static enum ggml_status backend_graph_compute(ggml_backend_t handle, ggml_cgraph * graph) {
    return self(handle).exec->compute(graph);
}

static void backend_event_record(ggml_backend_t handle, ggml_backend_event_t event) {
    ggml_backend_event_record(event, unwrap(handle));
}

static void backend_event_wait(ggml_backend_t handle, ggml_backend_event_t event) {
    ggml_backend_event_wait(unwrap(handle), event);
}

static void backend_graph_optimize(ggml_backend_t handle, ggml_cgraph * graph,
                                   ggml_backend_graph_optimize_params * params) {
    ggml_backend_t inner = unwrap(handle);
    if (inner->iface.graph_optimize != nullptr) {
        inner->iface.graph_optimize(inner, graph, params);
    }
}

static const ggml_backend_i backend_i = {
    /* .get_name            = */ backend_get_name,
    /* .free                = */ backend_free,
    /* .set_tensor_async    = */ backend_set_tensor_async,
    /* .get_tensor_async    = */ backend_get_tensor_async,
    /* .set_tensor_2d_async = */ backend_set_tensor_2d_async,
    /* .get_tensor_2d_async = */ backend_get_tensor_2d_async,
    /* .cpy_tensor_async    = */ backend_cpy_tensor_async,
    /* .synchronize         = */ backend_synchronize,
    /* .graph_plan_create   = */ nullptr,
    /* .graph_plan_free     = */ nullptr,
    /* .graph_plan_update   = */ nullptr,
    /* .graph_plan_compute  = */ nullptr,
    /* .graph_compute       = */ backend_graph_compute,
    /* .event_record        = */ backend_event_record,
    /* .event_wait          = */ backend_event_wait,
    /* .graph_optimize      = */ backend_graph_optimize,
};

static ggml_guid_t backend_guid() {
    static ggml_guid guid = { 0x52, 0x6f, 0x74, 0x61, 0x72, 0x79, 0x2d, 0x67,
                              0x67, 0x6d, 0x6c, 0x2d, 0x65, 0x78, 0x70, 0x31 };
    return &guid;
}

static bool is_rotary_backend(ggml_backend_t handle) {
    return ggml_guid_matches(ggml_backend_guid(handle), backend_guid());
}

ggml_backend_t backend_new(device & dev) {
    ggml_backend_ptr inner(ggml_backend_dev_init(dev.inner(), nullptr));
    if (!inner) {
        return nullptr;
    }
    auto context  = std::make_unique<backend>(backend{ dev, std::move(inner), nullptr, dev.name() });
    context->exec = std::make_unique<executor>(context->inner.get(), paged_pool_of);
    auto * made   = new ggml_backend{ backend_guid(), backend_i, dev.handle(), context.get() };
    context.release();
    dev.add_user(1);
    return made;
}

ggml_backend_t backend_inner(ggml_backend_t handle) {
    return unwrap(handle);
}

} // namespace rotary
