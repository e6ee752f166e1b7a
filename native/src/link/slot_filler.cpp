// SPDX-License-Identifier: MIT
//
// Slot filler. See slot_filler.hpp.

#include "link/slot_filler.hpp"

#include "base/clock.hpp"
#include "base/forked_compute.hpp"

#include <algorithm>

namespace rotary {

ggml_tensor slot_view(const ggml_tensor & slots, int32_t slot) {
    ggml_tensor one = slots;
    one.ne[2]       = 1;
    one.nb[3]       = one.nb[2];
    one.data        = (char *) one.data + one.nb[2] * slot;
    return one;
}

slot_filler::slot_filler(ggml_backend_t inner) :
    inner_(inner),
    context_(ggml_init({ ggml_tensor_overhead() * 4 + ggml_graph_overhead_custom(4, false), nullptr, true })) {
    if (!inner_is_cpu(ggml_backend_get_device(inner))) {
        return;
    }
    ggml_tensor * node =
        ggml_custom_4d(context_.get(), GGML_TYPE_F32, 4, 1, 1, 1, nullptr, 0, work, GGML_N_TASKS_MAX, this);
    node->data = node_data_;
    graph_     = ggml_new_graph_custom(context_.get(), 4, false);
    ggml_build_forward_expand(graph_, node);
}

void slot_filler::copy(const piece & piece) {
    ggml_tensor rows = piece.job->target();
    rows.ne[1]       = piece.last - piece.first;
    rows.nb[2] = rows.nb[3] = rows.nb[1] * rows.ne[1];
    rows.data               = (char *) rows.data + rows.nb[1] * piece.first;
    ggml_backend_tensor_set(&rows, piece.bytes + rows.nb[1] * piece.first, 0, rows.nb[2]);
}

void slot_filler::work(ggml_tensor *, int, int, void * self) {
    auto & filler = *(slot_filler *) self;
    while (true) {
        const size_t index = filler.next_.fetch_add(1, std::memory_order_relaxed);
        if (index >= filler.pieces_.size()) {
            return;
        }
        copy(filler.pieces_[index]);
    }
}

// Enqueue the copies: the inner backend's next graph waits for them, the host does not. The caller ensures that no
// earlier work still reads these slots.
ggml_status slot_filler::copy_by_link(transfer & transfer) {
    link &                           over = *transfer.over();
    std::vector<staging_ring::piece> pieces;
    for (const piece & each : pieces_) {
        const stored_tensor & tensor = *each.job->tensor;
        char *                to     = (char *) each.job->target().data;
        if (const char * pinned = transfer.pinned_at(tensor, each.job->expert, each.bytes)) {
            if (!over.copy(to, pinned, tensor.expert_bytes)) {
                return GGML_STATUS_FAILED;
            }
            continue;
        }
        for (size_t done = 0; done < tensor.expert_bytes; done += staging_ring::block_bytes) {
            pieces.push_back(
                { to + done, each.bytes + done, std::min(tensor.expert_bytes - done, staging_ring::block_bytes) });
        }
    }
    staging_ring * ring = pieces.empty() ? nullptr : transfer.ring();
    if ((!pieces.empty() && (ring == nullptr || !ring->copy(pieces))) || !over.record(copied_.get())) {
        return GGML_STATUS_FAILED;
    }
    ggml_backend_event_wait(inner_, copied_.get());
    return GGML_STATUS_SUCCESS;
}

ggml_status slot_filler::copy_all(transfer & transfer) {
    if (graph_ == nullptr && transfer.is_used()) {
        return copy_by_link(transfer);
    }
    if (graph_ == nullptr) {
        for (const piece & each : pieces_) {
            ggml_tensor slot = each.job->target();
            ggml_backend_tensor_set_async(inner_, &slot, each.bytes, 0, each.job->tensor->expert_bytes);
        }
        return GGML_STATUS_SUCCESS;
    }
    if (pieces_.size() <= 1) {
        std::for_each(pieces_.begin(), pieces_.end(), copy);
        return GGML_STATUS_SUCCESS;
    }
    next_              = 0;
    const auto compute = [&] {
        return ggml_backend_graph_compute(inner_, graph_);
    };
    return begin_computation(inner_) ? compute() : on_new_thread(compute);
}

ggml_status slot_filler::fill(expert_store & store, transfer & transfer, statistics & stats,
                              const std::vector<fill_job> & jobs) {
    // Repacked layouts interleave groups of at most this many rows.
    static constexpr int64_t row_group = 64;
    static constexpr size_t  max_bytes = 256 << 10; // of a piece

    for (size_t done = 0; done < jobs.size();) {
        // Wait for the first job only, and take the following ones that have landed.
        pieces_.clear();
        size_t n = 0;
        for (; done + n < jobs.size(); n++) {
            const fill_job & job = jobs[done + n];
            if (n > 0 && !store.fetchable(*job.tensor, job.expert)) {
                break;
            }
            const char * bytes = store.fetch(*job.tensor, job.expert);
            if (bytes == nullptr) {
                return GGML_STATUS_FAILED;
            }
            if (bytes == job.target().data) {
                continue; // read straight into its slot
            }
            const int64_t n_rows = job.slots->ne[1];
            const size_t  row    = job.tensor->expert_bytes / n_rows;
            const int64_t step   = graph_ == nullptr || n_rows % row_group != 0
                                       ? n_rows
                                       : std::max<int64_t>(max_bytes / row / row_group, 1) * row_group;
            for (int64_t first = 0; first < n_rows; first += step) {
                pieces_.push_back({ &job, bytes, first, std::min(first + step, n_rows) });
            }
        }
        const uint64_t    start  = now_us();
        const ggml_status status = copy_all(transfer);
        if (store.direct() != nullptr) {
            // Copies must have ended before release(), which lets the staging area be reused.
            if (graph_ == nullptr && !transfer.is_used()) {
                ggml_backend_synchronize(inner_);
            } else if (graph_ == nullptr && !transfer.over()->synchronize()) {
                return GGML_STATUS_FAILED;
            }
            for (size_t i = 0; i < n; i++) {
                store.release(*jobs[done + i].tensor, jobs[done + i].expert);
            }
            store.direct()->pump();
        }
        const uint64_t us = now_us() - start;
        stats.update([us](rotary_stats & totals) { totals.page_us += us; });
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        done += n;
    }
    return GGML_STATUS_SUCCESS;
}

} // namespace rotary
