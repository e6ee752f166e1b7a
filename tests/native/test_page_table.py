# SPDX-License-Identifier: MIT
"""The page table that a device resolves itself (native/src/cache/page_table.h) agrees with the slot table."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.native.test_slots import Table
from tests.support.compiled import pure_logic

COUNTERS = (
    "lookups", "requests", "misses", "evictions", "refused", "n_resident",
    "predicted", "predicted_right", "prefetched", "prefetch_used", "late_hits", "pieces_unused",
)  # fmt: skip
N_PIECES = 5


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """page_table_host.cpp, compiled."""
    loaded = pure_logic(tmp_path_factory.mktemp("table"), "native/page_table_host.cpp")
    loaded.table_new.restype = ctypes.c_void_p
    return loaded


def at(array):
    return array.ctypes.data_as(ctypes.c_void_p)


class PageTable:
    def __init__(self, host, n_expert, n_slots):
        self.host, self.n_slots = host, n_slots
        self.table = ctypes.c_void_p(host.table_new(n_expert, n_slots, N_PIECES))
        self.pages = np.full((n_slots, 3), -1, np.int32)

    def close(self):
        self.host.table_free(self.table)

    def resolve(self, ids, n_threads=1, stride=None):
        """Slot of each id, and loads as (expert, slot, first piece); None if refused."""
        ids = np.atleast_2d(np.asarray(ids, np.int32))
        n_tokens, n_used = ids.shape
        padded = np.full((n_tokens, stride or n_used), -7, np.int32)
        padded[:, :n_used] = ids
        slot_ids = np.full(ids.size, -1, np.int32)
        n = self.host.table_resolve(
            self.table, at(padded), n_used, n_tokens, padded.shape[1], n_threads, at(slot_ids), at(self.pages)
        )
        if n < 0:
            assert (slot_ids == 0).all(), "a refused lookup sends every row to a slot that there is"
            return None
        return slot_ids.tolist(), [tuple(page) for page in self.pages[:n].tolist()]

    def predict(self, scores, n_used, n_threads=1):
        """Prefetches as (expert, slot) for the best of scores[n_tokens, n_expert]."""
        scores = np.ascontiguousarray(scores, np.float32)
        n = self.host.table_predict(self.table, at(scores), len(scores), n_used, n_threads, at(self.pages))
        return [tuple(page[:2]) for page in self.pages[:n].tolist()]

    def deliver(self, n_pieces):
        self.host.table_arrive(self.table, n_pieces)

    def commit(self, n_threads=1):
        self.host.table_commit(self.table, n_threads)

    def counters(self):
        values = (ctypes.c_int64 * len(COUNTERS))()
        self.host.table_counters(self.table, values)
        return dict(zip(COUNTERS, values, strict=True))


def some_tables(native, host, seed):
    """A generator, a page table and a slot table of the same size, and the expected counters, all 0."""
    rng = np.random.default_rng(seed)
    n_expert = int(rng.integers(2, 40))
    n_slots = int(rng.integers(1, n_expert + 1))
    return (
        rng, PageTable(host, n_expert, n_slots), Table(native, n_expert, n_slots),
        dict.fromkeys(COUNTERS, 0),
    )  # fmt: skip


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_slot_table(native, host, seed, n_threads):
    rng, pages, table, expected = some_tables(native, host, seed)
    n_expert = table.n_expert
    for request in range(400 if n_threads == 1 else 60):
        n_used = int(rng.integers(1, n_expert + 1))
        n_tokens = int(rng.integers(1, 4))
        ids = rng.integers(0, n_expert, (n_tokens, n_used))
        if rng.integers(10) == 0:
            ids[rng.integers(n_tokens), rng.integers(n_used)] = rng.choice([-1, n_expert, 1 << 30])
        theirs = pages.resolve(ids, n_threads, stride=n_used + int(rng.integers(3)))
        ours = table.resolve(ids.ravel().tolist())
        assert (theirs is None) == (ours is None), request
        expected["lookups"] += 1
        expected["requests"] += ids.size
        if ours is None:
            expected["refused"] += 1
            continue
        assert theirs == (ours[0], [(expert, slot, 0) for expert, slot, _ in ours[1]]), request
        expected["misses"] += len(ours[1])
        expected["evictions"] += sum(evicted >= 0 for _, _, evicted in ours[1])
    expected["n_resident"] = len(table.resident())
    assert pages.counters() == expected
    assert expected["misses"] > 0 and (expected["evictions"] > 0) == (table.n_slots < n_expert)
    pages.close()


def best_first(scores, n_used):
    """Experts among the n_used best of any token, ordered by rank, then by token."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n_used]
    return list(dict.fromkeys(order.T.ravel().tolist()))


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_predictions_agree_with_reservations(native, host, seed, n_threads):
    rng, pages, table, expected = some_tables(native, host, seed)
    n_expert, n_slots = table.n_expert, table.n_slots
    for request in range(400 if n_threads == 1 else 60):
        # Predicted experts are reserved one after the other, as long as there are slots.
        n_used, n_tokens = int(rng.integers(1, n_expert + 1)), int(rng.integers(1, 5))
        scores = rng.normal(size=(n_tokens, n_expert)).round(1).astype(np.float32)  # with ties
        predicted = best_first(scores, n_used) if rng.integers(4) else []
        ahead = []
        for expert in predicted:
            if expert in table.resident():
                continue
            full = len(table.resident()) + len(ahead) == n_slots
            slot = table.reserve(expert, predicted)
            if slot < 0:
                break
            expected["evictions"] += full
            ahead.append((expert, slot))
        if predicted:
            assert pages.predict(scores, n_used, n_threads) == ahead, request
        delivered = int(rng.integers(0, len(ahead) * N_PIECES + 3))
        pages.deliver(delivered)
        pieces = {each[0]: min(max(delivered - i * N_PIECES, 0), N_PIECES) for i, each in enumerate(ahead)}
        expected["predicted"] += len(predicted)
        expected["prefetched"] += len(ahead)

        # At the lookup, an unwanted prefetch becomes resident, as the first to be evicted, if it is complete.
        ids = rng.integers(0, n_expert, (n_tokens, min(n_used, 4))).tolist()
        wanted = {expert for row in ids for expert in row}
        refused = len(wanted) > n_slots
        committed = rng.integers(8) == 0  # by the host, when it takes the table
        for expert, _ in ahead:
            if expert not in wanted or refused or committed:
                assert table.end(expert, pieces[expert] == N_PIECES) == 0
                expected["pieces_unused"] += pieces[expert]
        if committed:
            pages.commit(n_threads)
            pieces, predicted = {}, []
        theirs, ours = pages.resolve(ids, n_threads), table.resolve([each for row in ids for each in row])
        expected["lookups"] += 1
        expected["requests"] += n_tokens * len(ids[0])
        assert (theirs is None) == (ours is None) == refused, request
        if refused:
            expected["refused"] += 1
            continue
        loads = [(expert, slot, pieces.get(expert, 0)) for expert, slot, _ in ours[1]]
        assert theirs == (ours[0], loads), request
        used = [expert for expert, _, _ in loads if expert in pieces]
        expected["misses"] += len(loads)
        expected["evictions"] += sum(evicted >= 0 for _, _, evicted in ours[1])
        expected["predicted_right"] += len(wanted.intersection(predicted))
        expected["prefetch_used"] += len(used)
        expected["late_hits"] += sum(pieces[expert] < N_PIECES for expert in used)
    expected["n_resident"] = len(table.resident())
    assert pages.counters() == expected
    assert expected["prefetched"] > 0 and expected["predicted_right"] > 0
    if n_threads == 1:
        assert expected["prefetch_used"] > expected["late_hits"] > 0 < expected["pieces_unused"]
    pages.close()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_what_was_predicted_for_nothing(host, n_threads):
    # Prefetches for lookups that never come are committed when the next lookup is predicted.
    pages = PageTable(host, 32, 8)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ahead = pages.predict(rng.normal(size=(1, 32)), 4, n_threads)
        assert len(ahead) + pages.counters()["n_resident"] <= 8
        pages.deliver(int(rng.integers(0, 4 * N_PIECES)))
    slot_ids, loads = pages.resolve([[1, 2, 3, 4, 5, 6, 7, 8]], n_threads)
    assert sorted(slot_ids) == list(range(8)) and len(loads) <= 8
    assert pages.counters()["n_resident"] == 8
    pages.close()
