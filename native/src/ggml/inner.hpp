// SPDX-License-Identifier: MIT
//
// Inner devices: finding them, by name or by default.

#pragma once

#include "ggml-backend.h"

#include <string>
#include <vector>

namespace rotary {

// A device by its ggml name ("CPU", "CUDA0") or, for llama.cpp's RPC server, by "rpc://host:port". NULL and the reason
// as this thread's last error if there is none.
ggml_backend_dev_t inner_find(const std::string & name);

// Every GPU that is not ours; integrated ones if there is none, else the CPU.
std::vector<ggml_backend_dev_t> inner_default();

} // namespace rotary
