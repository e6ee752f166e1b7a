// SPDX-License-Identifier: MIT
//
// Page table of one layer as plain arrays, so that a GPU can hold it and resolve lookups without the host. Contract:
// rotary_slots_resolve() in rotary.h, request by request: free slots first, then the victim is the expert of the lowest
// value (policies lru and lfu); a lookup never evicts an expert that it wants. Between two lookups, slots can be
// reserved for experts that the next one will probably want, as by rotary_slots_reserve(), and prefetched piece by
// piece until it comes. One team of threads works on a table at a time; on the host, a team is one thread.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ROTARY_BOTH __host__ __device__ inline
#else
#define ROTARY_BOTH inline
#endif

#define ROTARY_PAGE_MAX_TOKENS 4                   // of a predicted lookup
#define ROTARY_PAGE_MAX_GAIN 1.2676506002282294e30 // 2^100: beyond it, all values are scaled down

struct rotary_page {
    int32_t expert; // to be paged in
    int32_t slot;   // into this slot
    int32_t first;  // the first piece to copy: earlier ones have arrived
};

// State that changes with every lookup, besides the arrays.
struct rotary_page_state {
    // clock, growth and unused_value: as in valued_policy (policies/policy.hpp).
    double   clock;
    double   growth;
    double   unused_value;
    int64_t  call;         // counts lookups and predictions
    int32_t  n_pages;      // pages[] of the last lookup
    int32_t  n_resident;
    int32_t  n_predicted;  // predicted[] for the next lookup
    int32_t  n_prefetches; // prefetches[]: slots reserved for some of these, in the order of their copies
    uint32_t n_begun;      // pieces of prefetches[] whose copies have begun; may exceed their number
    uint64_t demanded;     // number of the last lookup that has come: its prefetches stop
    // counters since they were last cleared
    uint64_t lookups, requests, misses, evictions;
    uint64_t refused;                    // lookups that named an expert out of range, or more experts than slots
    uint64_t predicted, predicted_right; // as in rotary_stats
    uint64_t prefetched, prefetch_used, late_hits;
    uint64_t pieces_unused;              // pieces that were prefetched and not used
};

struct rotary_page_table {
    int32_t             n_expert;
    int32_t             n_slots;
    int32_t             n_pieces;   // per expert
    rotary_page_state * state;
    double *            value;      // [n_expert] the lowest is the victim
    int64_t *           wanted_by;  // [n_expert] the last call that wanted this expert
    int32_t *           slot_of;    // [n_expert] -1: absent, or its slot is reserved
    int32_t *           expert_of;  // [n_slots] -1: free
    rotary_page *       pages;      // [n_slots]
    rotary_page *       prefetches; // [n_slots]
    int32_t *           predicted;  // [n_expert]
};

// Bytes of a table's arrays in one block, and a table over such a block. The state is elsewhere.
ROTARY_BOTH size_t rotary_page_table_bytes(int32_t n_expert, int32_t n_slots) {
    return (sizeof(double) + sizeof(int64_t) + 2 * sizeof(int32_t)) * n_expert +
           (sizeof(int32_t) + 2 * sizeof(rotary_page)) * n_slots;
}

ROTARY_BOTH rotary_page_table rotary_page_table_at(void * memory, rotary_page_state * state, int32_t n_expert,
                                                   int32_t n_slots, int32_t n_pieces) {
    rotary_page_table table;
    table.n_expert   = n_expert;
    table.n_slots    = n_slots;
    table.n_pieces   = n_pieces;
    table.state      = state;
    table.value      = (double *) memory;
    table.wanted_by  = (int64_t *) (table.value + n_expert);
    table.pages      = (rotary_page *) (table.wanted_by + n_expert);
    table.prefetches = table.pages + n_slots;
    table.slot_of    = (int32_t *) (table.prefetches + n_slots);
    table.expert_of  = table.slot_of + n_expert;
    table.predicted  = table.expert_of + n_slots;
    return table;
}

// A lookup's routing as ggml has it: [n_used, n_tokens], with strides in bytes.
struct rotary_page_ids {
    const char * data;
    int32_t      n_used;
    int32_t      n_tokens;
    int64_t      nb0;
    int64_t      nb1;
};

ROTARY_BOTH int32_t rotary_page_id(const rotary_page_ids & ids, int32_t i) {
    return *(const int32_t *) (ids.data + i / ids.n_used * ids.nb1 + i % ids.n_used * ids.nb0);
}

// Store a value that several members of a team may write to one place at the same time.
ROTARY_BOTH void rotary_page_put(int64_t * place, int64_t value) {
#ifdef __CUDA_ARCH__
    *(volatile int64_t *) place = value;
#else
    __atomic_store_n(place, value, __ATOMIC_RELAXED);
#endif
}

// A team of one.
struct rotary_page_alone {
    int32_t rank() const { return 0; }
    int32_t size() const { return 1; }
    void    sync() const {}
    void    add(int32_t * value, int32_t by) const { *value += by; }
    void    add(uint64_t * value, uint64_t by) const { *value += by; }
    bool    any(bool mine) const { return mine; }
    int32_t min(int64_t key, int32_t index) const { return key == INT64_MAX ? -1 : index; }
};

// Pieces of prefetches[index] that have arrived. Only valid while no prefetch runs.
ROTARY_BOTH int32_t rotary_page_arrived(const rotary_page_table & table, int32_t index) {
    const int64_t arrived = (int64_t) table.state->n_begun - (int64_t) index * table.n_pieces;
    return arrived < 0 ? 0 : arrived < table.n_pieces ? (int32_t) arrived : table.n_pieces;
}

// An integer that orders like `value`.
ROTARY_BOTH int64_t rotary_page_order(double value) {
    int64_t bits = 0;
    memcpy(&bits, &value, sizeof(bits));
    return bits < 0 ? INT64_MIN - bits : bits;
}

// Update values for a use of these experts, as policies/lru.cpp and lfu.cpp do.
template <class Team>
ROTARY_BOTH void rotary_page_note(const Team & team, const rotary_page_table & table, const rotary_page_ids & ids) {
    rotary_page_state & state  = *table.state;
    const int32_t       n      = ids.n_used * ids.n_tokens;
    const double        growth = state.growth;
    const double        before = state.clock;
    double              after  = before;
    for (int32_t t = 0; t < ids.n_tokens; t++) {
        after = growth > 0 ? after * growth : after + ids.n_used;
    }
    const bool much = growth > 0 && after > ROTARY_PAGE_MAX_GAIN;
    for (int32_t expert = team.rank(); expert < table.n_expert; expert += team.size()) {
        double value = table.value[expert];
        double clock = before;
        for (int32_t i = 0; i < n; i++) {
            clock            = growth > 0 ? (i % ids.n_used == 0 ? clock * growth : clock) : clock + 1;
            const bool wants = rotary_page_id(ids, i) == expert;
            value            = !wants ? value : growth > 0 ? value + clock : clock;
        }
        table.value[expert] = much ? value / ROTARY_PAGE_MAX_GAIN : value;
    }
    team.sync();
    if (team.rank() == 0) {
        state.clock = much ? after / ROTARY_PAGE_MAX_GAIN : after;
    }
}

// The slot to page an expert into: a free one, else that of the resident expert of the lowest value that `call` does
// not want; -1 if there is none. All members of the team get the same answer.
template <class Team>
ROTARY_BOTH int32_t rotary_page_victim(const Team & team, const rotary_page_table & table, int64_t call) {
    int64_t best_key  = INT64_MAX;
    int32_t best_slot = -1;
    for (int32_t slot = team.rank(); slot < table.n_slots; slot += team.size()) {
        const int32_t there = table.expert_of[slot];
        const int64_t key   = there < 0 ? INT64_MIN
                              : table.wanted_by[there] == call || table.slot_of[there] != slot
                                  ? INT64_MAX
                                  : rotary_page_order(table.value[there]);
        if (key < best_key) { // the lowest slot of equal ones
            best_key  = key;
            best_slot = slot;
        }
    }
    return team.min(best_key, best_slot);
}

// Give `slot` to `expert`, whose bytes are still to come. Called by one member of the team.
ROTARY_BOTH void rotary_page_take(const rotary_page_table & table, int32_t slot, int32_t expert) {
    rotary_page_state & state   = *table.state;
    const int32_t       evicted = table.expert_of[slot];
    if (evicted >= 0) {
        table.slot_of[evicted] = -1;
        state.n_resident--;
        state.evictions++;
    }
    table.expert_of[slot] = expert;
}

// End the reservations of experts that `call` does not want, or all if it is -1. An expert that has arrived whole
// becomes resident, with lru as the next victim; the slots of the others are free again.
template <class Team>
ROTARY_BOTH void rotary_page_commit(const Team & team, const rotary_page_table & table, int64_t call) {
    rotary_page_state & state = *table.state;
    for (int32_t i = team.rank(); i < state.n_prefetches; i += team.size()) {
        const rotary_page page    = table.prefetches[i];
        const int32_t     arrived = rotary_page_arrived(table, i);
        if (table.wanted_by[page.expert] != call) {
            table.slot_of[page.expert] = arrived == table.n_pieces ? page.slot : -1;
            table.expert_of[page.slot] = arrived == table.n_pieces ? page.expert : -1;
            if (state.growth <= 0) {
                table.value[page.expert] = state.unused_value - 1 - i;
            }
            team.add(&state.n_resident, arrived == table.n_pieces ? 1 : 0);
            team.add(&state.pieces_unused, arrived);
        }
    }
    team.sync();
    if (team.rank() == 0) {
        state.unused_value -= state.n_prefetches;
    }
}

// Make every expert of `ids` resident: slot_ids[n_used * n_tokens] receives the slots, table.pages the experts to page
// in. Called by every member of the team, once no prefetch runs. A refused lookup pages nothing in and maps every row
// to slot 0; the host sees state.refused and discards the output.
template <class Team>
ROTARY_BOTH void rotary_page_resolve(const Team & team, const rotary_page_table & table, const rotary_page_ids & ids,
                                     int32_t * slot_ids) {
    const int32_t       n     = ids.n_used * ids.n_tokens;
    rotary_page_state & state = *table.state;
    const int64_t       call  = state.call + 1;

    bool bad = false;
    for (int32_t i = team.rank(); i < n; i += team.size()) {
        const int32_t expert = rotary_page_id(ids, i);
        bad                  = bad || expert < 0 || expert >= table.n_expert;
    }
    bad = team.any(bad);
    for (int32_t i = team.rank(); i < n && !bad; i += team.size()) {
        rotary_page_put(&table.wanted_by[rotary_page_id(ids, i)], call);
    }
    team.sync();
    // More distinct experts than slots are possible only where there are more rows than slots.
    if (!bad && n > table.n_slots) {
        int32_t n_distinct = 0;
        for (int32_t expert = 0; expert < table.n_expert; expert++) {
            n_distinct += table.wanted_by[expert] == call;
        }
        bad = n_distinct > table.n_slots;
    }
    if (team.rank() == 0) {
        state.call    = call;
        state.n_pages = 0;
        state.lookups++;
        state.requests += n;
        state.refused += bad;
    }
    team.sync();

    for (int32_t i = team.rank(); i < state.n_predicted && !bad; i += team.size()) {
        team.add(&state.predicted_right, table.wanted_by[table.predicted[i]] == call);
    }
    rotary_page_commit(team, table, bad ? -1 : call);
    for (int32_t i = 0; i < n && !bad; i++) {
        const int32_t expert = rotary_page_id(ids, i);
        if (table.slot_of[expert] >= 0) {
            continue; // the whole team sees the same: writes are followed by a sync
        }
        int32_t prefetch = 0;
        while (prefetch < state.n_prefetches && table.prefetches[prefetch].expert != expert) {
            prefetch++;
        }
        const bool    prefetched = prefetch < state.n_prefetches;
        const int32_t slot       = prefetched ? table.prefetches[prefetch].slot : rotary_page_victim(team, table, call);
        team.sync(); // all members have seen that it is absent
        if (team.rank() == 0) {
            const int32_t first = prefetched ? rotary_page_arrived(table, prefetch) : 0;
            if (prefetched) {
                state.prefetch_used++;
                state.late_hits += first < table.n_pieces;
            } else {
                rotary_page_take(table, slot, expert);
            }
            table.slot_of[expert]        = slot;
            table.pages[state.n_pages++] = { expert, slot, first };
            state.n_resident++;
            state.misses++;
        }
        team.sync();
    }
    for (int32_t i = team.rank(); i < n; i += team.size()) {
        slot_ids[i] = bad ? 0 : table.slot_of[rotary_page_id(ids, i)];
    }
    if (!bad) {
        rotary_page_note(team, table, ids);
    }
    team.sync();
    if (team.rank() == 0) {
        state.n_predicted = state.n_prefetches = 0;
    }
}

// An integer that orders like `score`, where even NaNs have a place.
ROTARY_BOTH int64_t rotary_page_rank(float score) {
    int32_t bits = 0;
    memcpy(&bits, &score, sizeof(bits));
    return bits < 0 ? -(int64_t) (bits & 0x7fffffff) : bits;
}

// Predict the next lookup: for each token, the n_used experts with the highest of scores[n_expert, n_tokens], every
// token's likeliest first. Absent ones get reserved slots; resident ones are not evicted.
template <class Team>
ROTARY_BOTH void rotary_page_predict(const Team & team, const rotary_page_table & table, const float * scores,
                                     int32_t n_tokens, int32_t n_used) {
    rotary_page_state & state = *table.state;
    const int64_t       call  = state.call + 1;
    int64_t             last_key[ROTARY_PAGE_MAX_TOKENS];
    int32_t             last[ROTARY_PAGE_MAX_TOKENS];
    int32_t             n_predicted = 0;

    if (state.n_prefetches > 0) { // for a lookup that never came
        rotary_page_commit(team, table, -1);
    }
    team.sync();
    for (int32_t rank = 0; rank < n_used; rank++) {
        for (int32_t t = 0; t < n_tokens; t++) {
            int64_t best_key = INT64_MAX;
            int32_t best     = -1;
            for (int32_t expert = team.rank(); expert < table.n_expert; expert += team.size()) {
                const int64_t key  = -rotary_page_rank(scores[t * table.n_expert + expert]);
                const bool    past = rank > 0 && (key < last_key[t] || (key == last_key[t] && expert <= last[t]));
                if (!past && key < best_key) {
                    best_key = key;
                    best     = expert;
                }
            }
            best = team.min(best_key, best);
            if (best < 0) {
                continue; // there are fewer than n_used experts
            }
            last[t]     = best;
            last_key[t] = -rotary_page_rank(scores[t * table.n_expert + best]);
            if (table.wanted_by[best] != call) {
                team.sync();
                if (team.rank() == 0) {
                    table.wanted_by[best]        = call;
                    table.predicted[n_predicted] = best;
                }
                n_predicted++;
            }
            team.sync();
        }
    }
    int32_t n_prefetches = 0;
    for (int32_t i = 0; i < n_predicted; i++) {
        const int32_t expert = table.predicted[i];
        if (table.slot_of[expert] >= 0) {
            continue;
        }
        const int32_t slot = rotary_page_victim(team, table, call);
        if (slot < 0) {
            break;
        }
        if (team.rank() == 0) {
            rotary_page_take(table, slot, expert);
            table.prefetches[n_prefetches] = { expert, slot, 0 };
        }
        n_prefetches++;
        team.sync();
    }
    if (team.rank() == 0) {
        state.call         = call;
        state.n_predicted  = n_predicted;
        state.n_prefetches = n_prefetches;
        state.n_begun      = 0;
        state.predicted += n_predicted;
        state.prefetched += n_prefetches;
    }
}
