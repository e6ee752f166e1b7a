// SPDX-License-Identifier: MIT
//
// Catalogue. See catalogue.hpp.

#include "model/catalogue.hpp"

#include <algorithm>
#include <cstdlib>
#include <map>

namespace rotary {

int32_t layer_number(const std::string & name) {
    if (name.compare(0, 4, "blk.") != 0) {
        return -1;
    }
    char *     end = nullptr;
    const long il  = strtol(name.c_str() + 4, &end, 10);
    return end != name.c_str() + 4 && *end == '.' ? (int32_t) il : -1;
}

bool paged_layer::uses_direct_io() const {
    return std::any_of(tensors.begin(), tensors.end(), [](const auto * tensor) { return tensor->direct_io; });
}

bool paged_layer::reads_whole_sectors() const {
    return uses_direct_io() && std::all_of(tensors.begin(), tensors.end(), [](const paged_tensor * tensor) {
               return !tensor->direct_io || tensor->expert_bytes % tensor->file->alignment() == 0;
           });
}

paged_tensor & catalogue::add(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped) {
    auto paged           = std::make_unique<paged_tensor>();
    paged->name          = tensor->name;
    paged->n_expert      = (int32_t) tensor->ne[2];
    paged->expert_bytes  = tensor->nb[2];
    paged->data          = (const char *) tensor->data;
    paged->owner         = owner;
    paged->is_mapped     = is_mapped;
    paged->type          = tensor->type;
    paged->n_expert_used = n_expert_used;
    std::copy_n(tensor->ne, 3, paged->ne);
    tensors_.push_back(std::move(paged));
    return *tensors_.back();
}

void catalogue::remove_owner(const void * owner) {
    tensors_.erase(std::remove_if(tensors_.begin(), tensors_.end(),
                                  [owner](const auto & tensor) { return tensor->owner == owner; }),
                   tensors_.end());
}

// Tensors of one layer number share their routing if they have the same number of experts; a tensor without a layer
// number is a layer of its own. A name that repeats is another model's: the environment's pool may hold several models.
void catalogue::build_layers() {
    clear_layers();
    std::map<std::pair<int32_t, int32_t>, paged_layer *> known;
    for (size_t i = 0; i < tensors_.size(); i++) {
        paged_tensor & tensor = *tensors_[i];
        tensor.index          = (int32_t) i;
        const int32_t il      = layer_number(tensor.name);
        paged_layer * layer   = il < 0 ? nullptr : known[{ il, tensor.n_expert }];
        const bool    taken =
            layer != nullptr && std::any_of(layer->tensors.begin(), layer->tensors.end(),
                                            [&](const auto * each) { return each->name == tensor.name; });
        if (layer == nullptr || taken) {
            layers_.push_back(std::make_unique<paged_layer>());
            layer           = layers_.back().get();
            layer->il       = il;
            layer->n_expert = tensor.n_expert;
            if (il >= 0) {
                known[{ il, tensor.n_expert }] = layer;
            }
        }
        layer->n_expert_used = std::max(layer->n_expert_used, std::min(tensor.n_expert_used, layer->n_expert));
        layer->expert_bytes += tensor.expert_bytes;
        layer->tensors.push_back(&tensor);
        by_data_[tensor.data] = { layer, &tensor };
    }
    std::stable_sort(layers_.begin(), layers_.end(), [](const auto & a, const auto & b) { return a->il < b->il; });
    for (size_t i = 0; i < layers_.size(); i++) {
        layers_[i]->index = (int32_t) i;
        for (paged_tensor * tensor : layers_[i]->tensors) {
            tensor->layer = (int32_t) i;
        }
    }
}

void catalogue::clear_layers() {
    layers_.clear();
    by_data_.clear();
}

std::vector<const stored_tensor *> catalogue::stored() const {
    std::vector<const stored_tensor *> all;
    for (const auto & tensor : tensors_) {
        all.push_back(tensor.get());
    }
    return all;
}

std::vector<layer_size> catalogue::layer_sizes() const {
    std::vector<layer_size> sizes;
    for (const auto & layer : layers_) {
        sizes.push_back({ layer->expert_bytes, layer->n_expert, layer->n_expert_used });
    }
    return sizes;
}

paged_layer * catalogue::after(const paged_layer & layer) const {
    const auto next = (size_t) layer.index + 1;
    return next < layers_.size() ? layers_[next].get() : nullptr;
}

catalogue::place catalogue::find(const ggml_tensor * weight) const {
    const auto found = by_data_.find(weight->data);
    if (found == by_data_.end() || weight->ne[2] != found->second.tensor->n_expert ||
        weight->nb[2] != found->second.tensor->expert_bytes) {
        return { nullptr, nullptr };
    }
    return found->second;
}

bool catalogue::has_experts(int32_t il, const std::vector<int32_t> & experts) const {
    return std::all_of(tensors_.begin(), tensors_.end(), [&](const auto & tensor) {
        return layer_number(tensor->name) != il || std::all_of(experts.begin(), experts.end(), [&](int32_t expert) {
                   return expert >= 0 && expert < tensor->n_expert;
               });
    });
}

} // namespace rotary
