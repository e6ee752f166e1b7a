// SPDX-License-Identifier: MIT
//
// Device lookups. See device_lookup.hpp.

#include "exec/device_lookup.hpp"

#include "base/error.hpp"
#include "base/inner_device.hpp"
#include "prefetch/device_prefetch.hpp"

namespace rotary {

bool device_lookups::make_events() {
    return make_event(computed_, inner_) && make_event(paged_, inner_) && make_event(counted_, inner_);
}

ggml_status device_lookups::resolve(pool & pool, paged_layer & layer, const ggml_tensor * node) {
    paged_model &       model    = pool.model;
    const ggml_tensor * ids      = node->src[2];
    ggml_tensor *       slot_ids = model.lookup_memory.slot_ids(layer.index, ids->ne[0], ids->ne[1]);
    if (slot_ids == nullptr) {
        fail(ROTARY_ERR_MEMORY, format("%s: no memory for %lld ids on the inner device; lower n_ubatch",
                                       model.config.name.c_str(), (long long) ggml_nelements(ids)));
        return GGML_STATUS_ALLOC_FAILED;
    }
    model.tables.to_device(layer.index);
    rotary_link_lookup & lookup = model.tables.lookup(layer.index);
    lookup.ids      = { (const char *) ids->data, (int32_t) ids->ne[0], (int32_t) ids->ne[1], (int64_t) ids->nb[0],
                        (int64_t) ids->nb[1] };
    lookup.slot_ids = (int32_t *) slot_ids->data;
    lookup.number++;
    any_ = true;

    rotary_link_prediction next;
    const bool predicts = pool.predicted.on() && predict_on_device(model, pool.predicted, layer, node, inner_, next);

    ggml_backend_event_record(computed_.get(), inner_);
    link & over = *model.transfer.over();
    if (!over.wait(computed_.get()) || !over.look_up(lookup, predicts ? &next : nullptr) ||
        !over.record(paged_.get())) {
        return GGML_STATUS_FAILED;
    }
    lookup.predicted = false;
    if (predicts) {
        model.tables.lookup(layer.index + 1).predicted = true;
    }
    ggml_backend_event_wait(inner_, paged_.get());
    return GGML_STATUS_SUCCESS;
}

bool device_lookups::end_graph(pool & pool) {
    if (!any_) {
        return true;
    }
    if (!pool.model.tables.send_counts() || !pool.model.transfer.over()->record(counted_.get())) {
        return false;
    }
    ggml_backend_event_synchronize(counted_.get());
    return pool.model.tables.take_counts();
}

} // namespace rotary
