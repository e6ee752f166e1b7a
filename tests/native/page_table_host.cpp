// SPDX-License-Identifier: MIT
//
// C functions over native/src/cache/page_table.h: a table in host memory, resolved by one thread or a team of threads.

#include "cache/page_table.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// The barrier of a team, at which its members also vote.
struct meeting {
    std::mutex              mutex;
    std::condition_variable changed;
    int32_t                 size;
    int32_t                 n_there = 0;
    uint64_t                round   = 0;
    bool                    any = false, result = false;
    int64_t                 key   = INT64_MAX;
    int32_t                 index = -1, least = -1;

    // Wait for all members. Until the next meeting, `result` is the OR of `mine`, `least` the index of the lowest key.
    void meet(bool mine, int64_t my_key, int32_t my_index) {
        std::unique_lock<std::mutex> lock(mutex);
        any = any || mine;
        if (my_index >= 0 && (my_key < key || (my_key == key && (index < 0 || my_index < index)))) {
            key   = my_key;
            index = my_index;
        }
        const uint64_t mine_is = round;
        if (++n_there == size) {
            result  = any;
            least   = index;
            any     = false;
            key     = INT64_MAX;
            index   = -1;
            n_there = 0;
            round++;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return round != mine_is; });
        }
    }
};

struct threads_team {
    meeting & at;
    int32_t   my_rank;

    int32_t rank() const { return my_rank; }
    int32_t size() const { return at.size; }
    void    sync() const { at.meet(false, 0, -1); }
    void    add(int32_t * value, int32_t by) const {
        const std::lock_guard<std::mutex> lock(at.mutex);
        *value += by;
    }
    void add(uint64_t * value, uint64_t by) const {
        const std::lock_guard<std::mutex> lock(at.mutex);
        *value += by;
    }
    bool any(bool mine) const {
        at.meet(mine, 0, -1);
        const bool result = at.result;
        sync(); // all have read the result before the next vote changes it
        return result;
    }
    int32_t min(int64_t key, int32_t index) const {
        at.meet(false, key, index);
        const int32_t result = at.least;
        sync();
        return result;
    }
};

struct table {
    std::vector<int64_t> memory;
    rotary_page_state    state = {};
    rotary_page_table    arrays;
};

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Call `what` as each member of a team of n_threads.
template <typename What> static void as_team(int32_t n_threads, const What & what) {
    if (n_threads == 1) {
        what(rotary_page_alone{});
        return;
    }
    meeting                  at;
    std::vector<std::thread> team;
    at.size = n_threads;
    for (int32_t rank = 0; rank < n_threads; rank++) {
        team.emplace_back([&, rank] { what(threads_team{ at, rank }); });
    }
    for (std::thread & each : team) {
        each.join();
    }
}

EXPORT table * table_new(int32_t n_expert, int32_t n_slots, int32_t n_pieces) {
    auto * made = new table;
    made->memory.resize(rotary_page_table_bytes(n_expert, n_slots) / sizeof(int64_t) + 1);
    made->arrays = rotary_page_table_at(made->memory.data(), &made->state, n_expert, n_slots, n_pieces);
    for (int32_t i = 0; i < n_expert; i++) {
        made->arrays.slot_of[i] = -1;
    }
    for (int32_t i = 0; i < n_slots; i++) {
        made->arrays.expert_of[i] = -1;
    }
    return made;
}

EXPORT void table_free(table * made) {
    delete made;
}

// ids[n_tokens][n_used], `stride` elements from one token to the next. pages: expert, slot and first piece of each.
// Returns the number of pages, -1 if the lookup was refused.
EXPORT int32_t table_resolve(table * made, const int32_t * ids, int32_t n_used, int32_t n_tokens, int32_t stride,
                             int32_t n_threads, int32_t * slot_ids, int32_t * pages) {
    const rotary_page_ids all_ids = { (const char *) ids, n_used, n_tokens, sizeof(int32_t),
                                      (int64_t) sizeof(int32_t) * stride };
    const uint64_t        refused = made->state.refused;
    as_team(n_threads, [&](const auto & team) { rotary_page_resolve(team, made->arrays, all_ids, slot_ids); });
    memcpy(pages, made->arrays.pages, sizeof(rotary_page) * made->state.n_pages);
    return made->state.refused != refused ? -1 : made->state.n_pages;
}

// scores[n_tokens][n_expert] of the next lookup. ahead: pages to prefetch, laid out like pages. Returns their number.
EXPORT int32_t table_predict(table * made, const float * scores, int32_t n_tokens, int32_t n_used, int32_t n_threads,
                             int32_t * ahead) {
    as_team(n_threads, [&](const auto & team) { rotary_page_predict(team, made->arrays, scores, n_tokens, n_used); });
    memcpy(ahead, made->arrays.prefetches, sizeof(rotary_page) * made->state.n_prefetches);
    return made->state.n_prefetches;
}

// Set the number of prefetched pieces that have been copied; it may exceed those there are.
EXPORT void table_arrive(table * made, uint32_t n_pieces) {
    made->state.n_begun = n_pieces;
}

EXPORT void table_commit(table * made, int32_t n_threads) {
    as_team(n_threads, [&](const auto & team) {
        rotary_page_commit(team, made->arrays, -1);
        team.sync();
        if (team.rank() == 0) {
            made->state.n_prefetches = made->state.n_predicted = 0;
        }
    });
}

EXPORT void table_counters(const table * made, int64_t * counters) {
    const rotary_page_state & state = made->state;
    const uint64_t            all[] = { state.lookups,       state.requests,        state.misses,
                                        state.evictions,     state.refused,         (uint64_t) state.n_resident,
                                        state.predicted,     state.predicted_right, state.prefetched,
                                        state.prefetch_used, state.late_hits,       state.pieces_unused };
    for (int i = 0; i < 12; i++) {
        counters[i] = (int64_t) all[i];
    }
}
