# SPDX-License-Identifier: MIT
"""What to follow of what is foretold, and how far ahead (native/src/prefetch/gain.hpp)."""

from __future__ import annotations

import ctypes

import pytest
from paged import pure_logic

MIB = 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """experience_host.cpp, compiled."""
    loaded = pure_logic(tmp_path_factory.mktemp("experience"), "experience_host.cpp", "prefetch/gain.cpp")
    loaded.experience_new.restype = ctypes.c_void_p
    loaded.experience_layer_us.restype = ctypes.c_double
    for name in ("trusts", "pays"):
        getattr(loaded, f"experience_{name}").restype = ctypes.c_bool
    return loaded


class Experience:
    def __init__(self, library):
        self.library = library
        self.its = ctypes.c_void_p(library.experience_new())

    def __getattr__(self, name):
        return lambda *args: getattr(self.library, f"experience_{name}")(self.its, *args)


@pytest.fixture
def its(library):
    made = Experience(library)
    yield made
    made.free()


def test_ranks_are_followed_while_they_are_right(its):
    assert its.trusts(0, 7), "until it is known to be wrong"
    for _ in range(200):
        its.learn(0, 0, True)
        its.learn(0, 1, False)
        its.learn(1, 0, False)
    assert its.trusts(0, 0) and not its.trusts(0, 1) and not its.trusts(1, 0) and its.trusts(1, 1)
    for _ in range(200):
        its.learn(0, 1, True)
    assert its.trusts(0, 1), "and again when it is right"


def test_as_many_layers_as_fill_the_window(its):
    assert its.depth(ctypes.c_size_t(4 * MIB)) == 4, "nothing is known yet"
    for _ in range(200):
        its.count_read(ctypes.c_size_t(2 * MIB))
    depths = {mib: its.depth(ctypes.c_size_t(mib * MIB)) for mib in (1, 3, 5, 7, 9, 90)}
    assert depths == {1: 1, 3: 1, 5: 2, 7: 3, 9: 4, 90: 4}


def test_the_time_of_a_layer(its):
    for us in (1000.0, 250.0):
        for _ in range(200):
            its.count_layer(ctypes.c_double(us))
        assert its.layer_us() == pytest.approx(us, rel=0.01)


def test_nothing_is_foretold_that_costs_more_than_it_gains(its):
    def count(gain, cost):
        for _ in range(500):
            its.count(ctypes.c_double(gain), ctypes.c_double(cost))

    count(100.0, 20.0)
    assert all(its.pays() for _ in range(50))
    count(10.0, 20.0)
    tried = [its.pays() for _ in range(160)]
    assert sum(tried) == 10, "from time to time, to see whether it does again"
    count(100.0, 20.0)
    assert its.pays()
