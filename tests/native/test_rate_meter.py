# SPDX-License-Identifier: MIT
"""How fast a disk is, by reads that overlap (native/src/store/rate_meter.hpp)."""

from __future__ import annotations

import ctypes

import pytest

from tests.support.compiled import pure_logic

FIRST = 1000.0  # bytes per microsecond


class Meter:
    def __init__(self, library):
        self.library = library
        self.pointer = ctypes.c_void_p(library.rate_meter_new())

    def __getattr__(self, name):
        def call(*args):
            return getattr(self.library, f"rate_meter_{name}")(self.pointer, *map(ctypes.c_uint64, args))

        return call


@pytest.fixture
def meter(tmp_path):
    library = pure_logic(tmp_path, "native/rate_meter_host.cpp")
    library.rate_meter_new.restype = ctypes.c_void_p
    library.rate_meter_end.restype = ctypes.c_uint64
    library.rate_meter_rate.restype = ctypes.c_double
    made = Meter(library)
    yield made
    made.free()


def test_a_span_has_all_reads_in_flight(meter):
    # 8000 bytes in 20 us, two reads that overlap: 400 a microsecond, an eighth of the way from the guess.
    assert meter.rate() == FIRST
    meter.begin(6000, 100)
    meter.begin(2000, 110)
    assert meter.end(120, True) == 20
    assert meter.rate() == FIRST + (400 - FIRST) / 8
    # The next span begins with its own first read, however long the disk was idle.
    slower = meter.rate()
    meter.begin(1000, 5000)
    assert meter.end(5010, True) == 10
    assert meter.rate() == slower + (100 - slower) / 8


def test_what_is_noticed_late_is_a_lower_bound(meter):
    meter.begin(1000, 0)
    assert meter.end(10, False) == 10
    assert meter.rate() == FIRST, "100 may be too low"
    meter.begin(50_000, 20)
    assert meter.end(30, False) == 10
    assert meter.rate() == FIRST + (5000 - FIRST) / 8


def test_no_time_at_all(meter):
    meter.begin(5000, 7)
    assert meter.end(7, True) == 1
    assert meter.rate() == FIRST + (5000 - FIRST) / 8
