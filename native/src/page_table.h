// SPDX-License-Identifier: MIT
//
// Page table of one layer as plain arrays, so that a GPU can hold it and resolve a lookup without asking the host.
// Same contract as rotary_slots_resolve() in rotary.h, request by request: least recently used eviction, free slots
// first, what a lookup wants is never its victim. One team of threads resolves one lookup; on the host a team is one.

#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define ROTARY_BOTH __host__ __device__ inline
#else
#define ROTARY_BOTH inline
#endif

struct rotary_page {
    int32_t expert; // to be paged in
    int32_t slot;   // into this slot
};

// What changes with every lookup, besides the arrays.
struct rotary_page_state {
    int64_t clock;
    int64_t call;
    int32_t n_pages; // pages[] of the last lookup
    int32_t n_resident;
    // counters since they were last cleared
    uint64_t lookups, requests, misses, evictions;
    uint64_t refused; // lookups that named an expert out of range, or more experts than there are slots
};

struct rotary_page_table {
    int32_t             n_expert;
    int32_t             n_slots;
    rotary_page_state * state;
    int64_t *           last_use;  // [n_slots] value of the clock at the last use
    int64_t *           wanted_by; // [n_expert] the last call that wanted this expert
    int32_t *           slot_of;   // [n_expert] -1 absent
    int32_t *           expert_of; // [n_slots] -1 free
    rotary_page *       pages;     // [n_slots]
};

// Bytes of a table's arrays in one piece, and the table over such a piece, its state elsewhere.
ROTARY_BOTH size_t rotary_page_table_bytes(int32_t n_expert, int32_t n_slots) {
    return (sizeof(int64_t) + sizeof(int32_t)) * (n_expert + n_slots) + sizeof(rotary_page) * n_slots;
}

ROTARY_BOTH rotary_page_table rotary_page_table_at(void * memory, rotary_page_state * state, int32_t n_expert,
                                                   int32_t n_slots) {
    rotary_page_table table;
    table.n_expert  = n_expert;
    table.n_slots   = n_slots;
    table.state     = state;
    table.last_use  = (int64_t *) memory;
    table.wanted_by = table.last_use + n_slots;
    table.pages     = (rotary_page *) (table.wanted_by + n_expert);
    table.slot_of   = (int32_t *) (table.pages + n_slots);
    table.expert_of = table.slot_of + n_expert;
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

// A team of one.
struct rotary_page_alone {
    int32_t rank() const { return 0; }
    int32_t size() const { return 1; }
    void    sync() const {}
    void    raise(int64_t * value, int64_t to) const { *value = *value < to ? to : *value; }
    bool    any(bool mine) const { return mine; }
    int32_t least(int64_t key, int32_t index) const { return key == INT64_MAX ? -1 : index; }
};

// Make every expert of `ids` resident: slot_ids[n_used * n_tokens] receives their slots, table.pages what has to be
// paged in. Called by every member of the team. A refused lookup changes nothing, pages nothing in, and sends every row
// to slot 0: the host finds it counted, and its output is thrown away.
template <class Team>
ROTARY_BOTH void rotary_page_resolve(const Team & team, const rotary_page_table & table, const rotary_page_ids & ids,
                                     int32_t * slot_ids) {
    const int32_t       n     = ids.n_used * ids.n_tokens;
    rotary_page_state & state = *table.state;
    const int64_t       call  = state.call + 1;
    const int64_t       clock = state.clock;

    bool bad = false;
    for (int32_t i = team.rank(); i < n; i += team.size()) {
        const int32_t expert = rotary_page_id(ids, i);
        bad                  = bad || expert < 0 || expert >= table.n_expert;
    }
    bad = team.any(bad);
    for (int32_t i = team.rank(); i < n && !bad; i += team.size()) {
        table.wanted_by[rotary_page_id(ids, i)] = call;
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

    for (int32_t i = 0; i < n && !bad; i++) {
        const int32_t expert = rotary_page_id(ids, i);
        if (table.slot_of[expert] >= 0) {
            continue; // the same for the whole team: everything is written before a sync
        }
        int64_t best_key  = INT64_MAX;
        int32_t best_slot = -1;
        for (int32_t slot = team.rank(); slot < table.n_slots; slot += team.size()) {
            const int32_t there = table.expert_of[slot];
            const int64_t key   = there < 0                        ? INT64_MIN
                                  : table.wanted_by[there] == call ? INT64_MAX
                                                                   : table.last_use[slot];
            if (key < best_key) { // the lowest slot of equal ones
                best_key  = key;
                best_slot = slot;
            }
        }
        const int32_t slot = team.least(best_key, best_slot);
        if (team.rank() == 0) {
            const int32_t evicted = table.expert_of[slot];
            if (evicted >= 0) {
                table.slot_of[evicted] = -1;
                state.evictions++;
            } else {
                state.n_resident++;
            }
            table.slot_of[expert]        = slot;
            table.expert_of[slot]        = expert;
            table.pages[state.n_pages++] = { expert, slot };
            state.misses++;
        }
        team.sync();
    }
    for (int32_t i = team.rank(); i < n; i += team.size()) {
        slot_ids[i] = bad ? 0 : table.slot_of[rotary_page_id(ids, i)];
        if (!bad) {
            team.raise(&table.last_use[slot_ids[i]], clock + i + 1); // the last of several uses counts
        }
    }
    team.sync();
    if (team.rank() == 0 && !bad) {
        state.clock = clock + n;
    }
}
