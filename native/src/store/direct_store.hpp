// SPDX-License-Identifier: MIT
//
// Direct store: expert bytes read from the model's file by direct I/O, past the page cache, in the background, through a
// bounded staging area or straight to a read target. A *part* is one expert of one tensor; it is queued, in flight, or
// landed, until it is taken or dropped. Reads on demand go before prefetches, in the order they were asked for;
// neighbours in the file are read as one into the staging area. Knows neither slots nor graphs.
// Threading: none of its own; the pool locks. Reads go on in the background between calls.

#pragma once

#include "rotary.h"
#include "store/reader.hpp"
#include "store/staging_area.hpp"
#include "store/stored_tensor.hpp"

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

namespace rotary {

// Says where a prefetched part is read to. Asked when its read begins: a slot taken when it is queued would cost a resident
// expert for a read that may never begin.
class target_source {
  public:
    virtual ~target_source() = default;

    // NULL is the staging area.
    virtual char * claim(const stored_tensor & tensor, int32_t expert) = 0;
};

class direct_store {
  public:
    direct_store(std::unique_ptr<reader> reader, size_t staging_bytes);

    bool                     ok() const { return area_.ok(); }
    rotary_io                io() const { return reader_->kind(); }
    std::vector<std::string> take_io_notices() { return reader_->take_notices(); } // see there
    size_t                   staging_bytes() const { return area_.size(); }
    char *                   staging() const { return area_.base(); }

    enum class found { absent, in_flight, landed };

    // Want a part now, read to `target` unless it is already on its way to another; NULL is the staging area. A target has
    // its part's offset in the file modulo the file's alignment, and room around it for the rest of the first and the last
    // sector. Tells what a prefetch had already done for the part.
    found demand(const stored_tensor & tensor, int32_t expert, char * target = nullptr);

    // Want a part soon: read it when nothing is wanted now, to where `targets` says then, if it is not NULL.
    void prefetch(const stored_tensor & tensor, int32_t expert, target_source * targets);

    // Forget prefetches: those that have not begun; those of a tensor in the staging area or on their way there.
    void cancel_queued();
    void cancel(const stored_tensor & tensor);

    // Parts that are read to a target: whether one is on its way, how to wait until it is not, at which target it has
    // landed (or NULL), and how to forget that.
    bool knows(const stored_tensor & tensor, int32_t expert) const { return parts_.count({ &tensor, expert }) != 0; }
    bool in_flight(const stored_tensor & tensor, int32_t expert) const;
    void finish(const stored_tensor & tensor, int32_t expert);
    const char * landed_at(const stored_tensor & tensor, int32_t expert) const;
    void         drop(const stored_tensor & tensor, int32_t expert);

    // Notice what has landed, and start what can be started; neither waits.
    void notice() { reap(false); }
    void pump();

    // A part's bytes once it has landed, valid until take() or the next wait(); NULL with this thread's error if it
    // cannot be read.
    const char * wait(const stored_tensor & tensor, int32_t expert);
    bool         landed(const stored_tensor & tensor, int32_t expert) const;
    void         take(const stored_tensor & tensor, int32_t expert); // done with the bytes
    void         clear() noexcept; // done with everything; no target is written any more

    // Time for reading so much, and until everything demanded has landed, by the bandwidth seen so far.
    double time_for(size_t bytes) const { return (double) bytes / bytes_per_us_; } // us
    double expected_wait_us() const { return time_for(demanded_bytes_); }

    // Bytes of prefetches queued and in flight, and how many are worth having: more only delay what is demanded next.
    size_t prefetch_bytes() const { return prefetch_bytes_; }
    size_t prefetch_window() const;
    void   set_layer_time(double us) { layer_us_ = us; } // what is read in that time delays nothing

    struct counters {
        uint64_t reads          = 0;
        uint64_t bytes_read     = 0;
        uint64_t bytes_in_place = 0; // of those, not to the staging area
        uint64_t read_us        = 0; // with something in flight
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
        uint64_t              read     = 0;       // number of the read that brings it
        std::shared_ptr<char> block;              // of the staging area, shared by the parts of one read
        const char *          data  = nullptr;
        int                   error = 0;
    };
    struct read {
        std::vector<part_key> parts;
        std::shared_ptr<char>
               block; // here as well: a part may be dropped while the kernel still writes; NULL: at a target
        size_t bytes;

        std::shared_ptr<weight_file> file; // stays open, whatever becomes of the tensor meanwhile
    };

    bool start(std::deque<part_key> & queue, bool demanded);
    void begin(std::deque<part_key> & queue, size_t n, uint64_t from, uint64_t end, char * memory,
               const std::shared_ptr<char> & block);
    bool make_room();
    void reap(bool wait);
    void fail_part(const part_key & key, int error) const;

    staging_area                                 area_; // first, so the last to go: every block returns to it
    std::unordered_map<part_key, part, key_hash> parts_;
    std::deque<part_key>                         demanded_;
    std::deque<part_key>                         prefetches_;
    std::unordered_map<uint64_t, read>           reads_;
    uint64_t                                     next_read_       = 1;
    size_t                                       demanded_bytes_  = 0;    // queued or in flight
    size_t                                       prefetch_bytes_  = 0;    // queued or in flight
    size_t                                       in_flight_bytes_ = 0;
    uint64_t                                     busy_since_us_   = 0;    // with something in flight
    uint64_t                                     busy_bytes_      = 0;    // asked for since
    double                                       bytes_per_us_    = 1000; // seen; a guess at first
    double                                       layer_us_        = 4000; // likewise
    counters                                     counters_;
    std::vector<read_result>                     results_;
    std::unique_ptr<reader>                      reader_; // last, so the first to go: it waits for its reads
};

} // namespace rotary
