# SPDX-License-Identifier: MIT
"""The slot table through cffi: a trace solved by hand, then agreement with a Python model, by request."""

from __future__ import annotations

import numpy as np
import pytest


class Table:
    """The native slot table."""

    def __init__(self, native, n_expert, n_slots):
        self.c, self.ffi, self.n_expert, self.n_slots = native.c, native.ffi, n_expert, n_slots
        pointer = native.c.rotary_slots_new(n_expert, n_slots)
        assert pointer, "NULL"
        self.slots = native.ffi.gc(pointer, native.c.rotary_slots_free)

    def resolve(self, ids):
        """Slot of each id, and the loads as (expert, slot, evicted); None if refused."""
        slot_ids = self.ffi.new("int32_t[]", max(len(ids), 1))
        loads = self.ffi.new("rotary_load[]", self.n_slots)
        n_loads = self.c.rotary_slots_resolve(self.slots, list(ids), len(ids), slot_ids, loads)
        if n_loads < 0:
            return None
        return list(slot_ids)[: len(ids)], [(x.expert, x.slot, x.evicted) for x in loads[0:n_loads]]

    def reserve(self, expert, keep=()):
        return self.c.rotary_slots_reserve(self.slots, expert, list(keep), len(keep))

    def end(self, expert, resident):
        return self.c.rotary_slots_end_reservation(self.slots, expert, resident)

    def resident(self):
        slots = [self.c.rotary_slots_expert_of(self.slots, slot) for slot in range(self.n_slots)]
        return {expert for expert in slots if self.c.rotary_slots_slot_of(self.slots, expert) >= 0}


class ReferenceLru:
    """A plain model of the table: resident experts in order of last use, and reserved ones."""

    def __init__(self, n_slots):
        self.n_slots = n_slots
        self.order = []
        self.reserved = set()

    def full(self):
        return len(self.order) + len(self.reserved) == self.n_slots

    def reserve(self, expert, keep):
        """True if there was a slot."""
        if self.full():
            victim = next((old for old in self.order if old not in keep), None)
            if victim is None:
                return False
            self.order.remove(victim)
        self.reserved.add(expert)
        return True

    def end(self, expert, resident):
        self.reserved.remove(expert)
        if resident:
            self.order.insert(0, expert)

    def resolve(self, ids):
        """Experts to load and those evicted for them, or None if there are too many."""
        wanted = set(ids)
        if len(wanted) > self.n_slots - len(self.reserved - wanted):
            return None
        loads, evicted = [], []
        for expert in ids:
            if expert in self.order:
                self.order.remove(expert)
            else:
                loads.append(expert)
                if expert in self.reserved:
                    self.reserved.remove(expert)
                elif self.full():
                    victim = next(old for old in self.order if old not in wanted)
                    self.order.remove(victim)
                    evicted.append(victim)
            self.order.append(expert)
        return loads, evicted


def test_hand_solved_trace(native):
    # 5 experts, 3 slots; the order is least recently used first.
    #   [0 1]   loads 0->slot 0, 1->slot 1          order 0 1
    #   [2 0]   loads 2->slot 2, 0 hits             order 1 2 0
    #   [3]     evicts 1, which slot 1 had          order 2 0 3
    #   [2 4 2] 2 hits, 4 evicts 0 (slot 0)         order 3 4 2
    #   [3 0]   3 hits; 0 evicts 4, since 3 is held order 2 3 0
    table = Table(native, 5, 3)
    assert table.resolve([0, 1]) == ([0, 1], [(0, 0, -1), (1, 1, -1)])
    assert table.resolve([2, 0]) == ([2, 0], [(2, 2, -1)])
    assert table.resolve([3]) == ([1], [(3, 1, 1)])
    assert table.resolve([2, 4, 2]) == ([2, 0, 2], [(4, 0, 0)])
    assert table.resolve([3, 0]) == ([1, 0], [(0, 0, 4)])
    assert table.resident() == {0, 2, 3}
    assert native.c.rotary_slots_slot_of(table.slots, 4) == -1


def test_wanted_experts_are_never_evicted(native):
    # 0 is the least recently used, but the same call wants it later: 1 must go.
    table = Table(native, 4, 2)
    table.resolve([0, 1])
    assert table.resolve([2, 0]) == ([1, 0], [(2, 1, 1)])


def test_hand_solved_reservations(native):
    # 6 experts, 3 slots. 0 1 2 fill them, least recently used first: 0 1 2.
    table = Table(native, 6, 3)
    table.resolve([0, 1, 2])
    assert table.reserve(3, keep=[0]) == 1, "0 is kept, so 1 leaves slot 1"
    assert table.resident() == {0, 2}
    assert table.resolve([4]) == ([0], [(4, 0, 0)]), "what is reserved is not evicted"
    assert table.resolve([0, 1, 5]) is None, "three are wanted, and one slot is reserved"
    assert table.resolve([3]) == ([1], [(3, 1, -1)]), "wanted: a load into its own slot"
    # Order now 2 4 3.
    assert table.reserve(5) == 2 and table.end(5, resident=True) == 0
    assert table.resolve([0]) == ([2], [(0, 2, 5)]), "nobody wanted it: the first to leave"
    assert table.reserve(1) == 0 and table.end(1, resident=False) == 0
    assert table.resolve([2]) == ([0], [(2, 0, -1)]), "its slot is free"
    error = native.c.ROTARY_ERR_ARG
    assert (table.reserve(2), table.reserve(6), table.end(4, True)) == (error, error, error)
    assert table.reserve(4) >= 0 and table.reserve(4) == error, "reserved already"
    native.c.rotary_slots_clear(table.slots)
    assert table.reserve(4) == 0 and table.reserve(5) == 1 and table.reserve(1) == 2
    assert table.reserve(0) == native.c.ROTARY_ERR_BUDGET, "every slot is reserved"


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_the_reference(native, seed):
    rng = np.random.default_rng(seed)
    n_expert = int(rng.integers(1, 40))
    n_slots = int(rng.integers(1, n_expert + 1))
    table, reference = Table(native, n_expert, n_slots), ReferenceLru(n_slots)
    for request in range(500):
        expert = int(rng.integers(n_expert))
        if expert in reference.reserved:
            resident = bool(rng.integers(2))
            assert table.end(expert, resident) == 0, request
            reference.end(expert, resident)
        elif expert not in reference.order and rng.integers(2):
            keep = rng.integers(0, n_expert, n_slots // 2).tolist()
            assert (table.reserve(expert, keep) >= 0) == reference.reserve(expert, keep), request
        ids = rng.integers(0, n_expert, int(rng.integers(0, 2 * n_slots + 1))).tolist()
        theirs, ours = table.resolve(ids), reference.resolve(ids)
        assert (theirs is None) == (ours is None), request
        if theirs is not None:
            slot_ids, loads = theirs
            assert [expert for expert, _, _ in loads] == ours[0], request
            assert [evicted for _, _, evicted in loads if evicted >= 0] == ours[1], request
            assert [native.c.rotary_slots_expert_of(table.slots, slot) for slot in slot_ids] == ids, request
        assert table.resident() == set(reference.order), request
        assert native.c.rotary_slots_n_resident(table.slots) == len(reference.order), request


def test_refusals_change_nothing(native):
    table = Table(native, 4, 2)
    table.resolve([0, 1])
    assert table.resolve([0, 1, 2]) is None
    assert table.resolve([4]) is None
    assert table.resolve([-1]) is None
    assert table.resolve([1, 0]) == ([1, 0], [])


@pytest.mark.parametrize(("n_expert", "n_slots"), [(0, 0), (4, 0), (4, 5), (-1, 1)])
def test_impossible_tables(native, n_expert, n_slots):
    assert not native.c.rotary_slots_new(n_expert, n_slots)


def test_clear(native):
    table = Table(native, 4, 2)
    table.resolve([3, 1])
    native.c.rotary_slots_clear(table.slots)
    assert table.resident() == set()
    assert table.resolve([1])[1] == [(1, 0, -1)]
