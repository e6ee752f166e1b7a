// SPDX-License-Identifier: MIT
//
// Direct store. See direct_store.hpp.

#include "store/direct_store.hpp"

#include "base/clock.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <cstring>

namespace rotary {

// ---- demands and prefetches

direct_store::direct_store(std::unique_ptr<reader> reader, size_t staging_bytes) :
    area_(staging_bytes), reader_(std::move(reader)) {
    results_.reserve(reader::max_in_flight); // so that the reader can always deliver
}

direct_store::found direct_store::demand(const stored_tensor & tensor, int32_t expert, char * target) {
    const auto [it, absent] = parts_.try_emplace({ &tensor, expert }, part{});
    part & entry            = it->second;
    bool   fresh            = absent;
    if (entry.now == state::failed) {
        entry = part{}; // try again
        fresh = true;
    }
    if (entry.now == state::queued && !entry.demanded) {
        prefetch_bytes_ -= fresh ? 0 : tensor.expert_bytes; // start() will skip its entry in the prefetch queue
        entry.demanded = true;
        entry.target   = target;
        demanded_bytes_ += tensor.expert_bytes;
        demanded_.push_back(it->first);
        return found::absent;
    }
    if (entry.now == state::in_flight && !entry.demanded) {
        prefetch_bytes_ -= tensor.expert_bytes;
        demanded_bytes_ += tensor.expert_bytes;
    }
    const bool late = entry.now == state::in_flight;
    entry.demanded  = true;
    return late ? found::in_flight : found::landed;
}

void direct_store::prefetch(const stored_tensor & tensor, int32_t expert, target_source * targets) {
    const auto [it, absent] = parts_.try_emplace({ &tensor, expert }, part{});
    if (absent) {
        it->second.targets = targets;
        prefetch_bytes_ += tensor.expert_bytes;
        prefetches_.push_back(it->first);
    }
}

void direct_store::cancel_queued() {
    for (const part_key & key : prefetches_) {
        const auto it = parts_.find(key);
        if (it != parts_.end() && it->second.now == state::queued && !it->second.demanded) {
            prefetch_bytes_ -= key.first->expert_bytes;
            parts_.erase(it);
        }
    }
    prefetches_.clear();
}

void direct_store::cancel(const stored_tensor & tensor) {
    for (auto it = parts_.begin(); it != parts_.end();) {
        const part & entry = it->second;
        const bool   begun = entry.now == state::in_flight || entry.now == state::landed;
        if (it->first.first != &tensor || entry.demanded || (begun && entry.target != nullptr)) {
            ++it;
            continue;
        }
        if (entry.now == state::queued || entry.now == state::in_flight) {
            prefetch_bytes_ -= tensor.expert_bytes;
        }
        it = parts_.erase(it);
    }
}

bool direct_store::in_flight(const stored_tensor & tensor, int32_t expert) const {
    const auto it = parts_.find({ &tensor, expert });
    return it != parts_.end() && it->second.now == state::in_flight;
}

void direct_store::finish(const stored_tensor & tensor, int32_t expert) {
    while (in_flight(tensor, expert)) {
        reap(true);
    }
}

const char * direct_store::landed_at(const stored_tensor & tensor, int32_t expert) const {
    const auto it = parts_.find({ &tensor, expert });
    return it != parts_.end() && it->second.now == state::landed ? it->second.target : nullptr;
}

void direct_store::drop(const stored_tensor & tensor, int32_t expert) {
    const auto it = parts_.find({ &tensor, expert });
    if (it != parts_.end() && it->second.now == state::queued) {
        (it->second.demanded ? demanded_bytes_ : prefetch_bytes_) -= tensor.expert_bytes;
    }
    if (it != parts_.end()) {
        parts_.erase(it);
    }
}

size_t direct_store::prefetch_window() const {
    // What the disk reads while a layer is computed, and enough to keep several requests in flight.
    return std::max<size_t>(std::min((size_t) (rate_.bytes_per_us() * layer_us_), area_.size() / 2), 4 << 20);
}

// ---- reading

void direct_store::pump() {
    reap(false);
    while (reads_.size() < reader_->capacity() && start(demanded_, true)) {
    }
    while (reads_.size() < reader_->capacity() && demanded_.empty() && in_flight_bytes_ < prefetch_window() &&
           start(prefetches_, false)) {
    }
}

// Start the read at the front of a queue; false if the queue is empty or there is no room.
bool direct_store::start(std::deque<part_key> & queue, bool demanded) {
    // Reading neighbours as one amortises a request. Prefetches stay short: a demand may have to wait behind one.
    const size_t max_bytes = demanded ? 4 << 20 : 1 << 20;

    const auto waiting = [&](const part_key & key) {
        const auto it = parts_.find(key);
        return it != parts_.end() && it->second.now == state::queued && it->second.demanded == demanded;
    };
    while (!queue.empty() && !waiting(queue.front())) {
        queue.pop_front(); // cancelled, or moved to the other queue
    }
    if (queue.empty()) {
        return false;
    }
    const stored_tensor & first = *queue.front().first;
    const uint64_t        begin = first.offset + first.expert_bytes * queue.front().second;
    const size_t          align = first.file->alignment();
    const uint64_t        from  = begin / align * align;

    part & leader = parts_[queue.front()];
    if (leader.targets != nullptr && !demanded) {
        leader.target = leader.targets->claim(first, queue.front().second);
    }
    if (leader.target != nullptr) {
        this->begin(queue, 1, from, begin + first.expert_bytes, leader.target - (begin - from), nullptr);
        return true;
    }

    size_t   n   = 0;
    uint64_t end = begin;
    while (n < queue.size()) {
        const auto [tensor, expert] = queue[n];
        if (tensor->file != first.file || tensor->offset + tensor->expert_bytes * expert != end ||
            (n > 0 && (!waiting(queue[n]) || parts_[queue[n]].target != nullptr ||
                       parts_[queue[n]].targets != nullptr || end + tensor->expert_bytes - begin > max_bytes))) {
            break;
        }
        end += tensor->expert_bytes;
        n++;
    }
    size_t size   = 0;
    char * memory = nullptr;
    while (true) {
        size   = (end - from + align - 1) / align * align;
        memory = area_.take(size);
        if (memory != nullptr) {
            break;
        }
        if (demanded && make_room()) {
            continue;
        }
        if (n == 1) {
            return false;
        }
        n--;
        end -= queue[n].first->expert_bytes;
    }
    this->begin(queue, n, from, end, memory,
                std::shared_ptr<char>(memory, [this, size](char * it) { area_.give(it, size); }));
    return true;
}

// Start one read of the file's bytes [from, end), for the first n parts of a queue.
void direct_store::begin(std::deque<part_key> & queue, size_t n, uint64_t from, uint64_t end, char * memory,
                         const std::shared_ptr<char> & block) {
    const stored_tensor & first = *queue.front().first;
    const uint64_t        start = first.offset + first.expert_bytes * queue.front().second;
    const size_t          align = first.file->alignment();
    const size_t          size  = (end - from + align - 1) / align * align;
    const uint64_t        tag   = next_read_++;
    // Allocate first: reads_ has an entry if and only if the read was submitted.
    std::vector<part_key> parts(queue.begin(), queue.begin() + n);
    reads_.emplace(tag, read{ std::move(parts), block, (size_t) (end - start), first.file });
    try {
        reader_->submit({ first.file->fd(), from, memory, size, (size_t) (end - from), align, tag });
    } catch (...) {
        reads_.erase(tag);
        throw;
    }
    char * data = memory + (start - from);
    for (size_t i = 0; i < n; i++) {
        part & each = parts_[queue[i]];
        each.now    = state::in_flight;
        each.read   = tag;
        each.block  = block;
        each.data   = data;
        data += queue[i].first->expert_bytes;
        counters_.prefetched += !each.demanded && queue[i].first->counts_expert;
    }
    queue.erase(queue.begin(), queue.begin() + n);
    rate_.begin(size, now_us());
    in_flight_bytes_ += end - start;
    counters_.reads++;
    counters_.bytes_read += size;
    counters_.bytes_in_place += block ? 0 : size;
}

// Drop the oldest prefetch that landed in the staging area and is not demanded; false if there is none.
bool direct_store::make_room() {
    auto oldest = parts_.end();
    for (auto it = parts_.begin(); it != parts_.end(); ++it) {
        const part & entry = it->second;
        if (entry.now == state::landed && entry.block && !entry.demanded &&
            (oldest == parts_.end() || entry.read < oldest->second.read)) {
            oldest = it;
        }
    }
    if (oldest == parts_.end()) {
        return false;
    }
    parts_.erase(oldest);
    return true;
}

void direct_store::reap(bool wait) {
    reader_->complete(results_, wait); // if it throws, what it delivered stays in results_ for the next call
    for (const read_result & result : results_) {
        const auto finished = reads_.find(result.tag);
        for (const part_key & key : finished->second.parts) {
            const auto it = parts_.find(key);
            if (it == parts_.end() || it->second.read != result.tag) {
                continue; // dropped since, and perhaps requested again
            }
            part & each = it->second;
            each.now    = result.error == 0 ? state::landed : state::failed;
            each.error  = result.error;
            if (result.error != 0) {
                each.block.reset(); // make_room() frees landed parts only
            }
            (each.demanded ? demanded_bytes_ : prefetch_bytes_) -= key.first->expert_bytes;
        }
        in_flight_bytes_ -= finished->second.bytes;
        reads_.erase(finished);
    }
    if (!results_.empty() && in_flight_bytes_ == 0) {
        counters_.read_us += rate_.end(now_us(), wait);
    }
    results_.clear();
}

bool direct_store::landed(const stored_tensor & tensor, int32_t expert) const {
    const auto it = parts_.find({ &tensor, expert });
    return it != parts_.end() && it->second.now == state::landed;
}

const char * direct_store::wait(const stored_tensor & tensor, int32_t expert) {
    const part_key key{ &tensor, expert };
    demand(tensor, expert);
    if (!landed(tensor, expert)) {
        const uint64_t start_us = now_us();
        pump();
        while (parts_[key].now == state::queued || parts_[key].now == state::in_flight) {
            if (!reads_.empty()) {
                reap(true);
            } else {
                // Nothing is in flight and there is no room: drop the landed parts, and read them again after this one.
                for (auto & [other, entry] : parts_) {
                    if (entry.now == state::landed && entry.block) {
                        entry          = part{};
                        entry.demanded = true;
                        demanded_bytes_ += other.first->expert_bytes;
                        demanded_.push_back(other);
                    }
                }
                demanded_.push_front(key);
            }
            pump();
        }
        counters_.stall_us += now_us() - start_us;
    }
    const part & part = parts_[key];
    if (part.now == state::failed) {
        fail_part(key, part.error);
        parts_.erase(key); // the next demand tries again
        return nullptr;
    }
    return part.data;
}

void direct_store::fail_part(const part_key & key, int error) const {
    const stored_tensor & tensor = *key.first;
    const weight_file &   file   = *tensor.file;
    if (!file.unchanged()) {
        return;
    }
    fail(ROTARY_ERR_READ,
         format("%s: %s, expert %d: reading %zu bytes at %llu failed, %s; check the disk, then load the model again",
                file.path().c_str(), tensor.name.c_str(), key.second, tensor.expert_bytes,
                (unsigned long long) (tensor.offset + tensor.expert_bytes * key.second), strerror(error)));
}

void direct_store::take(const stored_tensor & tensor, int32_t expert) {
    const auto it = parts_.find({ &tensor, expert });
    if (it != parts_.end() && it->second.now == state::landed) {
        parts_.erase(it);
    }
}

void direct_store::clear() noexcept {
    if (std::any_of(reads_.begin(), reads_.end(), [](const auto & each) { return each.second.block == nullptr; })) {
        reader_->finish(); // no read may write to a target any more; the next reap() takes the results
    }
    parts_.clear();
    demanded_.clear();
    prefetches_.clear();
    demanded_bytes_ = prefetch_bytes_ = 0;
}

void direct_store::reset_counters() {
    counters_ = {};
    for (const auto & [key, entry] : parts_) { // a prefetch used after the reset counts as made after it
        const bool begun = entry.now == state::in_flight || entry.now == state::landed;
        counters_.prefetched += begun && !entry.demanded && key.first->counts_expert;
    }
}

} // namespace rotary
