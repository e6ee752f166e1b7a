// SPDX-License-Identifier: MIT
//
// Stored tensor: where the bytes of one expert matrix of a model are, expert by expert.

#pragma once

#include "store/weight_file.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace rotary {

struct stored_tensor {
    std::string  name;
    int32_t      index = 0; // among the pool's tensors
    int32_t      layer = 0; // among the pool's layers
    int32_t      n_expert;
    size_t       expert_bytes;
    const char * data;                       // of expert 0: in llama.cpp's mapping, or in memory that llama.cpp filled
    const void * owner;                      // the paged buffer it lies in
    bool         is_mapped;
    bool         direct_io     = false;      // read from the file by direct I/O: `data` must not be read
    bool         counts_expert = false;      // the first that its layer uses: its reads count as the expert's

    std::shared_ptr<weight_file> file;       // that `data` is mapped from; NULL if none
    uint64_t                     offset = 0; // of expert 0 in `file`

    size_t       bytes() const { return expert_bytes * n_expert; }
    const char * at(int32_t expert) const { return data + expert_bytes * expert; }
};

} // namespace rotary
