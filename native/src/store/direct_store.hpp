// SPDX-License-Identifier: MIT
//
// Direct store: reads experts from the model's file by direct I/O, past the page cache, in the background, into a
// bounded staging area or straight to a read target. A *part* is one expert of one tensor; it is queued, in flight,
// landed or failed, until it is taken or dropped. Reads on demand go before prefetches, each in the order of the
// requests; neighbours in the file are read as one into the staging area. Knows neither slots nor graphs.
// Threading: none of its own; the pool locks. Reads go on in the background between calls.

#pragma once

#include "rotary.h"
#include "store/rate_meter.hpp"
#include "store/reader.hpp"
#include "store/staging_area.hpp"
#include "store/stored_tensor.hpp"

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

namespace rotary {

// Chooses the read target of a prefetched part when its read begins: a slot claimed earlier would evict a resident
// expert for a read that may never begin.
class target_source {
  public:
    virtual ~target_source() = default;

    // NULL: read it to the staging area.
    virtual char * claim(const stored_tensor & tensor, int32_t expert) = 0;
};

class direct_store {
  public:
    direct_store(std::unique_ptr<reader> reader, size_t staging_bytes);

    bool                     ok() const { return area_.ok(); }
    rotary_io                io() const { return reader_->kind(); }
    std::vector<std::string> take_io_notices() { return reader_->take_notices(); }
    size_t                   staging_bytes() const { return area_.size(); }
    char *                   staging() const { return area_.base(); }

    enum class found { absent, in_flight, landed };

    // Request a part now, read to `target` (NULL: the staging area) unless it is already being read elsewhere. A
    // target's address equals the part's offset in the file modulo the file's alignment, with room around it for the
    // rest of the first and the last sector. Returns what a prefetch had already done for the part.
    found demand(const stored_tensor & tensor, int32_t expert, char * target = nullptr);

    // Request a part for when no demand is waiting. `targets` chooses its read target then; NULL: the staging area.
    void prefetch(const stored_tensor & tensor, int32_t expert, target_source * targets);

    // Cancel prefetches: all that have not begun; all of one tensor, except those that have begun to a read target.
    void cancel_queued();
    void cancel(const stored_tensor & tensor);

    // For parts with a read target: finish() waits while the part is in flight; landed_at() is the target it has landed
    // at, or NULL; drop() forgets the part. knows() is true of every part.
    bool knows(const stored_tensor & tensor, int32_t expert) const { return parts_.count({ &tensor, expert }) != 0; }
    bool in_flight(const stored_tensor & tensor, int32_t expert) const;
    void finish(const stored_tensor & tensor, int32_t expert);
    const char * landed_at(const stored_tensor & tensor, int32_t expert) const;
    void         drop(const stored_tensor & tensor, int32_t expert);

    // notice() sees which reads have landed; pump() also starts those that can be started. Neither waits.
    void notice() { reap(false); }
    void pump();

    // Wait for a part. Returns its bytes, valid until take() or the next wait(); NULL with this thread's error.
    const char * wait(const stored_tensor & tensor, int32_t expert);
    bool         landed(const stored_tensor & tensor, int32_t expert) const;
    void         take(const stored_tensor & tensor, int32_t expert); // done with the bytes
    void         clear() noexcept; // drop all parts; afterwards no read writes to a target

    // Microseconds to read `bytes`, and until all demanded parts have landed, at the bandwidth measured so far.
    double time_for(size_t bytes) const { return (double) bytes / rate_.bytes_per_us(); }
    double expected_wait_us() const { return time_for(demanded_bytes_); }

    // Bytes of prefetches queued and in flight, and how many are worth it: more would only delay the next demand.
    size_t prefetch_bytes() const { return prefetch_bytes_; }
    size_t prefetch_window() const;
    void   set_layer_time(double us) { layer_us_ = us; } // computing a layer; reads in that time delay nothing

    struct counters {
        uint64_t reads          = 0;
        uint64_t bytes_read     = 0;
        uint64_t bytes_in_place = 0; // of bytes_read, straight to a read target
        uint64_t read_us        = 0; // with at least one read in flight
        uint64_t stall_us       = 0; // in wait()
        uint64_t prefetched     = 0; // experts whose read was started as a prefetch
    };
    const counters & counted() const { return counters_; }
    void             reset_counters();

  private:
    using part_key = std::pair<const stored_tensor *, int32_t>;
    struct key_hash {
        size_t operator()(const part_key & key) const {
            return std::hash<const void *>()(key.first) ^ ((size_t) key.second * 0x9E3779B97F4A7C15u);
        }
    };
    enum class state { queued, in_flight, landed, failed };
    struct part {
        state                 now      = state::queued;
        bool                  demanded = false;
        target_source *       targets  = nullptr; // of a prefetch whose target is yet to be claimed
        char *                target   = nullptr; // NULL: the staging area
        uint64_t              read     = 0;       // number of the part's read
        std::shared_ptr<char> block;              // in the staging area, shared by the parts of one read
        const char *          data  = nullptr;
        int                   error = 0;
    };
    struct read {
        std::vector<part_key> parts;
        std::shared_ptr<char>
               block; // held here too: a part may be dropped while the kernel still writes; NULL: to a target
        size_t bytes;

        std::shared_ptr<weight_file> file; // keeps it open if the tensor goes meanwhile
    };

    bool start(std::deque<part_key> & queue, bool demanded);
    void begin(std::deque<part_key> & queue, size_t n, uint64_t from, uint64_t end, char * memory,
               const std::shared_ptr<char> & block);
    bool make_room();
    void reap(bool wait);
    void fail_part(const part_key & key, int error) const;

    staging_area                                 area_; // first, so destroyed last: every block returns to it
    std::unordered_map<part_key, part, key_hash> parts_;
    std::deque<part_key>                         demanded_;
    std::deque<part_key>                         prefetches_;
    std::unordered_map<uint64_t, read>           reads_;
    uint64_t                                     next_read_       = 1;
    size_t                                       demanded_bytes_  = 0; // queued or in flight
    size_t                                       prefetch_bytes_  = 0; // queued or in flight
    size_t                                       in_flight_bytes_ = 0;
    rate_meter                                   rate_;
    double                                       layer_us_ = 4000; // a guess until set_layer_time()
    counters                                     counters_;
    std::vector<read_result>                     results_;
    std::unique_ptr<reader>                      reader_; // last, so destroyed first: it waits for its reads
};

} // namespace rotary
