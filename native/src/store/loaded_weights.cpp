// SPDX-License-Identifier: MIT
//
// Loaded weights. See loaded_weights.hpp.

#include "store/loaded_weights.hpp"

#include "base/fork.hpp"

#include "ggml-cpp.h"
#include "gguf.h"

#include <iterator>
#include <map>
#include <mutex>

namespace rotary {

// ---- experts

struct known_experts {
    size_t       bytes;
    std::string  path;  // of their file; empty if they are in none
    const void * owner; // the paged buffer
};

// By the address of expert 0. Never destroyed: models may outlive static objects.
static auto & ranges_mutex = *new fork_mutex;
static auto & ranges       = *new std::map<const char *, known_experts>;

void register_experts(const stored_tensor & tensor) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    ranges[tensor.data] = { tensor.bytes(), tensor.file ? tensor.file->path() : "", tensor.owner };
}

void forget_experts_of(const void * owner) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    for (auto each = ranges.begin(); each != ranges.end();) {
        each = each->second.owner == owner ? ranges.erase(each) : std::next(each);
    }
}

std::vector<memory_range> all_experts(std::set<std::string> & paths) {
    const std::lock_guard<std::mutex> lock(ranges_mutex);
    std::vector<memory_range>         found;
    for (const auto & [data, experts] : ranges) {
        char * begin = const_cast<char *>(data);
        found.push_back({ begin, begin + experts.bytes });
        paths.insert(experts.path);
    }
    return found;
}

// ---- what the loader copies

static auto & copied_mutex    = *new fork_mutex;
static auto & copied_now      = *new std::set<std::string>;
static bool   copied_all_told = false; // experts have come: the next weight belongs to another model

void note_weight(const std::string & name, bool copied) {
    const std::lock_guard<std::mutex> lock(copied_mutex);
    if (copied_all_told) {
        copied_now.clear();
        copied_all_told = false;
    }
    if (copied) {
        copied_now.insert(name);
    }
}

std::set<std::string> copied_by_loader() {
    const std::lock_guard<std::mutex> lock(copied_mutex);
    copied_all_told = true;
    return copied_now;
}

std::vector<memory_range> ranges_of(const std::set<std::string> & names, const stored_tensor & tensor) {
    std::vector<memory_range> found;
    if (names.empty()) {
        return found;
    }
    const gguf_context_ptr header(gguf_init_from_file(tensor.file->path().c_str(), { true, nullptr }));
    char *                 base = const_cast<char *>(tensor.data) - tensor.offset;
    for (int64_t i = 0; header && i < gguf_get_n_tensors(header.get()); i++) {
        if (names.count(gguf_get_tensor_name(header.get(), i)) != 0) {
            char * begin = base + gguf_get_data_offset(header.get()) + gguf_get_tensor_offset(header.get(), i);
            found.push_back({ begin, begin + gguf_get_tensor_size(header.get(), i) });
        }
    }
    return found;
}

} // namespace rotary
