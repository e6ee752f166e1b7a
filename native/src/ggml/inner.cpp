// SPDX-License-Identifier: MIT
//
// Finding inner devices. See inner.hpp.

#include "ggml/inner.hpp"

#include "base/error.hpp"
#include "ggml/device.hpp"

namespace rotary {

static std::string device_names() {
    std::string names;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (!is_rotary(dev)) {
            names += (names.empty() ? "" : ", ") + std::string(ggml_backend_dev_name(dev));
        }
    }
    return names;
}

static ggml_backend_dev_t find_rpc(const std::string & name, const std::string & endpoint) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) {
        fail(ROTARY_ERR_DEVICE,
             format("%s: this llama.cpp has no RPC backend; build it with GGML_RPC=ON", name.c_str()));
        return nullptr;
    }
    using add_server_t        = ggml_backend_reg_t (*)(const char *);
    const auto add_server     = (add_server_t) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    ggml_backend_reg_t server = add_server != nullptr ? add_server(endpoint.c_str()) : nullptr;
    if (server == nullptr || ggml_backend_reg_dev_count(server) == 0) {
        fail(ROTARY_ERR_DEVICE,
             format("%s: no RPC server answers with a device; start rpc-server there", name.c_str()));
        return nullptr;
    }
    return ggml_backend_reg_dev_get(server, 0);
}

ggml_backend_dev_t inner_find(const std::string & name) {
    static const std::string scheme = "rpc://";
    if (name.compare(0, scheme.size(), scheme) == 0) {
        return find_rpc(name, name.substr(scheme.size()));
    }
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(name.c_str());
    if (dev == nullptr || is_rotary(dev)) {
        fail(ROTARY_ERR_DEVICE, format("%s: no such inner device; this llama.cpp has %s; name one of them",
                                       name.c_str(), device_names().c_str()));
        return nullptr;
    }
    return dev;
}

std::vector<ggml_backend_dev_t> inner_default() {
    for (const enum ggml_backend_dev_type type :
         { GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU, GGML_BACKEND_DEVICE_TYPE_CPU }) {
        std::vector<ggml_backend_dev_t> found;
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            ggml_backend_dev_t dev = ggml_backend_dev_get(i);
            if (ggml_backend_dev_type(dev) == type && !is_rotary(dev)) {
                found.push_back(dev);
            }
        }
        if (!found.empty()) {
            return found;
        }
    }
    return {};
}

} // namespace rotary
