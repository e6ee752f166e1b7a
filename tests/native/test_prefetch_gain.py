# SPDX-License-Identifier: MIT
"""Which predictions are followed, and how many layers ahead (native/src/prefetch/gain.hpp)."""

from __future__ import annotations

import ctypes

import pytest

from tests.support.compiled import pure_logic

MIB = 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """prefetch_gain_host.cpp, compiled."""
    loaded = pure_logic(tmp_path_factory.mktemp("gain"), "native/prefetch_gain_host.cpp", "prefetch/gain.cpp")
    loaded.prefetch_gain_new.restype = ctypes.c_void_p
    loaded.prefetch_gain_layer_us.restype = ctypes.c_double
    for name in ("trusts", "pays"):
        getattr(loaded, f"prefetch_gain_{name}").restype = ctypes.c_bool
    return loaded


class Gain:
    def __init__(self, library):
        self.library = library
        self.pointer = ctypes.c_void_p(library.prefetch_gain_new())

    def __getattr__(self, name):
        return lambda *args: getattr(self.library, f"prefetch_gain_{name}")(self.pointer, *args)


@pytest.fixture
def gain(library):
    made = Gain(library)
    yield made
    made.free()


def test_ranks_are_followed_while_they_are_right(gain):
    assert gain.trusts(0, 7), "until it is known to be wrong"
    for _ in range(200):
        gain.learn(0, 0, True)
        gain.learn(0, 1, False)
        gain.learn(1, 0, False)
    assert gain.trusts(0, 0) and not gain.trusts(0, 1) and not gain.trusts(1, 0) and gain.trusts(1, 1)
    for _ in range(200):
        gain.learn(0, 1, True)
    assert gain.trusts(0, 1), "and again when it is right"


def test_as_many_layers_as_fill_the_window(gain):
    assert gain.depth(ctypes.c_size_t(4 * MIB)) == 4, "nothing is known yet"
    for _ in range(200):
        gain.count_read(ctypes.c_size_t(2 * MIB))
    depths = {mib: gain.depth(ctypes.c_size_t(mib * MIB)) for mib in (1, 3, 5, 7, 9, 90)}
    assert depths == {1: 1, 3: 1, 5: 2, 7: 3, 9: 4, 90: 4}


def test_the_time_of_a_layer(gain):
    for us in (1000.0, 250.0):
        for _ in range(200):
            gain.count_layer(ctypes.c_double(us))
        assert gain.layer_us() == pytest.approx(us, rel=0.01)


def test_no_prediction_costs_more_than_it_gains(gain):
    def count(gained_us, cost_us):
        for _ in range(500):
            gain.count(ctypes.c_double(gained_us), ctypes.c_double(cost_us))

    count(100.0, 20.0)
    assert all(gain.pays() for _ in range(50))
    count(10.0, 20.0)
    tried = [gain.pays() for _ in range(160)]
    assert sum(tried) == 10, "from time to time, to see whether it does again"
    count(100.0, 20.0)
    assert gain.pays()
