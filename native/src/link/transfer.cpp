// SPDX-License-Identifier: MIT
//
// Transfer. See transfer.hpp.

#include "link/transfer.hpp"

#include "base/error.hpp"

#include "ggml-impl.h"

#include <algorithm>

namespace rotary {

static constexpr size_t ring_bytes = staging_ring::block_bytes * staging_ring::n_blocks;

void transfer::open(const std::vector<const stored_tensor *> & tensors) {
    std::string reason;
    if (!link_) {
        link_ = link::to(inner_, reason);
    }
    if (!link_) {
        if (!reason.empty()) {
            notices_.say(format("%s: the host copies experts to %s and waits for each layer: %s", model_.c_str(),
                                ggml_backend_dev_name(inner_), reason.c_str()));
        }
        return;
    }
    bool pinned = false;
    if (const direct_store * direct = store_.direct()) {
        pinned = pinned_.pin_staging(*link_, *direct, reason);
        if (pinned && std::any_of(tensors.begin(), tensors.end(), [](const auto * each) { return !each->direct_io; })) {
            pinned = false;
            reason = "not all are read from files";
        }
    } else {
        pinned = pinned_.pin(*link_, tensors, reason);
    }
    const uint64_t pinned_bytes = pinned_.bytes() + (ring_ ? ring_bytes : 0);
    stats_.update([&](rotary_stats & totals) { totals.locked_bytes = pinned_bytes; });
    uses_link_ = true;
    if (pinned) {
        GGML_LOG_INFO("rotary: %s: %s page-locked for %s\n", model_.c_str(), mib(pinned_bytes).c_str(),
                      ggml_backend_dev_name(inner_));
    } else if (ring() == nullptr) {
        uses_link_ = false;
        notices_.say(format("%s: the host copies experts to %s and waits for each layer: %s", model_.c_str(),
                            ggml_backend_dev_name(inner_), last_error()));
    } else {
        notices_.say(
            format("%s: experts are not page-locked but pass through %s that is, which costs the host's time: %s",
                   model_.c_str(), mib(ring_bytes).c_str(), reason.c_str()));
    }
}

bool transfer::synchronize() const {
    return !link_ || link_->synchronize();
}

staging_ring * transfer::ring() {
    if (!ring_) {
        std::string reason;
        ring_ = staging_ring::open(link_, inner_, reason);
        if (!ring_) {
            fail(ROTARY_ERR_MEMORY, format("%s: %s", ggml_backend_dev_name(inner_), reason.c_str()));
            return nullptr;
        }
        if (!reason.empty()) {
            notices_.say(format("%s: %s", model_.c_str(), reason.c_str()));
        }
        stats_.update([](rotary_stats & totals) { totals.locked_bytes += ring_bytes; });
    }
    return ring_.get();
}

const char * transfer::pinned_at(const stored_tensor & tensor, int32_t expert, const char * fetched) const {
    if (!tensor.direct_io) {
        return pinned_.at(tensor, expert);
    }
    const bool pinned = store_.ram().contains(fetched) ? store_.ram().is_pinned() : pinned_.in_staging(fetched);
    return pinned ? fetched : nullptr;
}

void transfer::abandon() {
    (void) ring_.release();
}

} // namespace rotary
