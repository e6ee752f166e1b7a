// SPDX-License-Identifier: MIT
//
// First fill. See first_fill.hpp.

#include "model/first_fill.hpp"

#include "base/error.hpp"
#include "link/slot_filler.hpp"

#include <algorithm>
#include <set>

namespace rotary {

int32_t first_fill::set(const paged_model & model, int32_t il, std::vector<int32_t> experts) {
    if (!model.experts.has_experts(il, experts) ||
        std::set<int32_t>(experts.begin(), experts.end()).size() != experts.size()) {
        return fail(ROTARY_ERR_ARG, format("%s: layer %d has no such experts, or not so often; make the profile anew",
                                           model.config.name.c_str(), il));
    }
    profile_[il] = std::move(experts);
    return ROTARY_OK;
}

static int32_t load_all(paged_model & model, const paged_layer & layer, const std::vector<rotary_load> & loads) {
    for (const paged_tensor * tensor : layer.tensors) {
        for (size_t i = 0; tensor->direct_io && i < loads.size(); i++) {
            model.store.direct()->demand(*tensor, loads[i].expert);
        }
    }
    for (const paged_tensor * tensor : layer.tensors) {
        for (const rotary_load & load : loads) {
            const char * bytes = model.store.fetch(*tensor, load.expert);
            if (bytes == nullptr) {
                return last_status();
            }
            ggml_tensor slot = slot_view(*tensor->slots, load.slot);
            ggml_backend_tensor_set(&slot, bytes, 0, tensor->expert_bytes);
            model.store.release(*tensor, load.expert);
        }
    }
    return ROTARY_OK;
}

int32_t first_fill::fill(paged_model & model, const paged_layer & layer) const {
    std::vector<rotary_load> loads;
    const auto               profile = profile_.find(layer.il);
    if (layer.path == ROTARY_PATH_RESIDENT) {
        for (int32_t expert = 0; expert < layer.n_expert; expert++) {
            loads.push_back({ expert, expert, -1 });
        }
    } else if (layer.path == ROTARY_PATH_SLOTS && profile != profile_.end()) {
        std::vector<int32_t> experts = profile->second;
        experts.resize(std::min(experts.size(), (size_t) layer.n_slots()));
        const auto n = (int32_t) experts.size();
        // One use of each is noted, the most wanted expert last.
        for (auto expert = experts.rbegin(); expert != experts.rend(); expert++) {
            layer.table->note(&*expert, nullptr, 1, 1);
        }
        std::vector<int32_t> slots(n);
        loads.resize(n);
        layer.table->place(experts.data(), n, slots.data(), loads.data());
    }
    return load_all(model, layer, loads);
}

} // namespace rotary
