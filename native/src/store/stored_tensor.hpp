// SPDX-License-Identifier: MIT
//
// Stored tensor: one expert matrix of a model, as the store knows it: where the bytes of each of its experts are.

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
    const char * data;                  // of expert 0: in llama.cpp's mapping of the file, or in memory that it filled
    const void * owner;                 // the paged buffer it lies in
    bool         is_mapped;
    bool         direct_io     = false; // read from the file by direct I/O: nothing is at `data`
    bool         counts_expert = false; // the first its layer uses: reads of it count as reads of the expert

    std::shared_ptr<weight_file> file;  // that `data` is mapped from, NULL if it is not
    uint64_t                     offset = 0; // of expert 0 in it

    size_t       bytes() const { return expert_bytes * n_expert; }
    const char * at(int32_t expert) const { return data + expert_bytes * expert; }
};

} // namespace rotary
