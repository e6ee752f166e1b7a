# SPDX-License-Identifier: MIT
"""The page table that a device resolves itself (native/src/page_table.h): request by request as the
slot table."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
from conftest import ROOT
from test_slots import Table

np = pytest.importorskip("numpy")

COUNTERS = ("lookups", "requests", "misses", "evictions", "refused", "n_resident")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """page_table_host.cpp, compiled."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler for page_table_host.cpp")
    library = tmp_path_factory.mktemp("table") / "table.so"
    source = ROOT / "tests" / "page_table_host.cpp"
    includes = f"-I{ROOT / 'native' / 'src'}"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, includes, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.table_new.restype = ctypes.c_void_p
    return loaded


class PageTable:
    def __init__(self, host, n_expert, n_slots):
        self.host, self.n_slots = host, n_slots
        self.table = ctypes.c_void_p(host.table_new(n_expert, n_slots))

    def close(self):
        self.host.table_free(self.table)

    def resolve(self, ids, n_threads=1, stride=None):
        """As test_slots.Table: slot of each id and the loads as (expert, slot); None if refused."""
        ids = np.atleast_2d(np.asarray(ids, np.int32))
        n_tokens, n_used = ids.shape
        padded = np.full((n_tokens, stride or n_used), -7, np.int32)
        padded[:, :n_used] = ids
        slot_ids = np.full(ids.size, -1, np.int32)
        pages = np.full(2 * self.n_slots, -1, np.int32)

        def at(array):
            return array.ctypes.data_as(ctypes.c_void_p)

        n = self.host.table_resolve(
            self.table, at(padded), n_used, n_tokens, padded.shape[1], n_threads, at(slot_ids), at(pages)
        )
        if n < 0:
            assert (slot_ids == 0).all(), "a refused lookup sends every row to a slot that there is"
            return None
        return slot_ids.tolist(), [tuple(pair) for pair in pages[: 2 * n].reshape(n, 2).tolist()]

    def counters(self):
        values = (ctypes.c_int64 * 6)()
        self.host.table_counters(self.table, values)
        return dict(zip(COUNTERS, values, strict=True))


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_slot_table(native, host, seed, n_threads):
    rng = np.random.default_rng(seed)
    n_expert = int(rng.integers(2, 40))
    n_slots = int(rng.integers(1, n_expert + 1))
    pages, table = PageTable(host, n_expert, n_slots), Table(native, n_expert, n_slots)
    expected = dict.fromkeys(COUNTERS, 0)
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
        assert theirs == (ours[0], [(expert, slot) for expert, slot, _ in ours[1]]), request
        expected["misses"] += len(ours[1])
        expected["evictions"] += sum(evicted >= 0 for _, _, evicted in ours[1])
    expected["n_resident"] = len(table.resident())
    assert pages.counters() == expected
    assert expected["misses"] > 0 and expected["evictions"] >= 0
    pages.close()
