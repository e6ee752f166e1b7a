// SPDX-License-Identifier: MIT
//
// Direct store: expert bytes read from the model's file past the page cache, in the background, through a bounded
// staging area, or straight to where they are wanted. A *part* is one expert of one tensor; it is queued, in flight, or
// landed, until it is taken or dropped. Reads on demand go before prefetches, in the order they were asked for;
// neighbours in the file are read as one into the staging area. Knows neither slots nor graphs.
// Threading: none of its own; the pool locks. Reads go on in the background between calls.

#pragma once

#include "rotary.h"
#include "store/reader.hpp"
#include "store/weight_file.hpp"

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

namespace rotary {

struct paged_tensor;

// Memory for reads in flight, in one piece: first fit over whole units, neighbours joined again when they are freed.
class staging_area {
  public:
    explicit staging_area(size_t bytes);
    ~staging_area();
    staging_area(const staging_area &)             = delete;
    staging_area & operator=(const staging_area &) = delete;

    bool   ok() const { return base_ != nullptr; }
    size_t size() const { return size_; }
    char * base() const { return base_; }
    char * take(size_t bytes); // NULL if there is no room
    void   give(char * block, size_t bytes) noexcept;

    static constexpr size_t unit = 4096;

  private:
    struct gap {
        size_t offset, size;
    };

    char *           base_ = nullptr;
    size_t           size_;
    size_t           n_taken_ = 0;
    std::vector<gap> free_; // in order; with room for what may be given back
};

class direct_store {
  public:
    // Where a prefetched part may be read to, given when its read begins: NULL is the staging area. A place has its
    // part's offset in the file modulo the file's alignment, and the rest of the first and the last sector around it.
    using place_for = std::function<char *(const paged_tensor & tensor, int32_t expert)>;

    direct_store(std::unique_ptr<reader> reader, size_t staging_bytes, place_for place);

    bool                     ok() const { return area_.ok(); }
    rotary_io                io() const { return reader_->kind(); }
    std::vector<std::string> take_io_notices() { return reader_->take_notices(); } // see there
    size_t                   staging_bytes() const { return area_.size(); }
    char *                   staging() const { return area_.base(); }

    enum class found { absent, in_flight, landed };

    // Want a part now, at `place` if it is not on its way to another. Tells what a prefetch had already done for it.
    found demand(const paged_tensor & tensor, int32_t expert, char * place = nullptr);

    // Want a part soon: read it when nothing is wanted now, in place if there is one for it.
    void prefetch(const paged_tensor & tensor, int32_t expert, bool in_place);

    // Forget prefetches: those that have not begun; those of a tensor in the staging area or on their way there.
    void cancel_queued();
    void cancel(const paged_tensor & tensor);

    // Parts at their place: whether one is on its way, how to wait until it is not, where it has landed (or NULL), and
    // how to forget that.
    bool knows(const paged_tensor & tensor, int32_t expert) const { return parts_.count({ &tensor, expert }) != 0; }
    bool in_flight(const paged_tensor & tensor, int32_t expert) const;
    void finish(const paged_tensor & tensor, int32_t expert);
    const char * landed_at(const paged_tensor & tensor, int32_t expert) const;
    void         drop(const paged_tensor & tensor, int32_t expert);

    // Notice what has landed, and start what can be started; neither waits.
    void notice() { land(false); }
    void pump();

    // A part's bytes once it has landed, valid until take() or the next wait(); NULL with this thread's error if it
    // cannot be read.
    const char * wait(const paged_tensor & tensor, int32_t expert);
    bool         landed(const paged_tensor & tensor, int32_t expert) const;
    void         take(const paged_tensor & tensor, int32_t expert); // done with the bytes
    void         clear(); // done with everything; no place is written any more

    // Time for reading so much, and until everything demanded has landed, by the bandwidth seen so far.
    double time_for(size_t bytes) const { return (double) bytes / bytes_per_us_; } // us
    double expected_wait_us() const { return time_for(demanded_bytes_); }

    // Bytes of prefetches queued and in flight, and how many are worth having: more only delay what is demanded next.
    size_t prefetch_bytes() const { return prefetch_bytes_; }
    size_t prefetch_window() const;
    void   expect_layers_of(double us) { layer_us_ = us; } // what is read meanwhile costs nothing

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
    using part_key = std::pair<const paged_tensor *, int32_t>;
    struct key_hash {
        size_t operator()(const part_key & key) const {
            return std::hash<const void *>()(key.first) ^ ((size_t) key.second * 0x9E3779B97F4A7C15u);
        }
    };
    enum class state { queued, in_flight, landed, failed };
    struct part {
        state                 now      = state::queued;
        bool                  demanded = false;
        bool                  in_place = false;   // a prefetch for which a place is to be sought
        char *                place    = nullptr; // NULL: the staging area
        uint64_t              read     = 0;       // the read it comes with
        std::shared_ptr<char> block;              // of the staging area, shared by the parts of one read
        const char *          data  = nullptr;
        int                   error = 0;
    };
    struct read {
        std::vector<part_key> parts;
        std::shared_ptr<char> block; // here as well: a part may be dropped while the kernel still writes; NULL in place
        size_t                bytes;

        std::shared_ptr<weight_file> file; // stays open, whatever becomes of the tensor meanwhile
    };

    bool start(std::deque<part_key> & queue, bool demanded);
    void begin(std::deque<part_key> & queue, size_t n, uint64_t from, uint64_t end, char * memory,
               const std::shared_ptr<char> & block);
    bool make_room();
    void land(bool wait);
    void fail_part(const part_key & key, const part & its) const;

    place_for                                    place_;
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
    double                                       layer_us_        = 4000; // the same
    counters                                     counters_;
    std::vector<read_result>                     results_;
    std::unique_ptr<reader>                      reader_; // last, so the first to go: it waits for its reads
};

} // namespace rotary
