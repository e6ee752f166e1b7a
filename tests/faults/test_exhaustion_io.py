# SPDX-License-Identifier: MIT
"""Reads, rings and threads that are refused: each call and each call site of the library fails in turn.

A failure ends in a clear error or in an announced fallback, and the next run is exact.
"""

from __future__ import annotations

import pytest

from rotary_llamacpp.errors import RotaryError
from tests.support.compiled import Shortage
from tests.support.paged import assert_equal, load_late, make
from tests.support.processes import apart, has_io_uring
from tests.support.tracing import trace

pytestmark = pytest.mark.model

PROMPT = 24
IN_BATCHES = {"n_ubatch": 8}
TWO_THREADS = {"n_threads": 2, "n_threads_batch": 2}


def attempt(model, rotary):
    """Load and run a model, change its budget, run again; returns traces, notices and the error."""
    llama = None
    try:
        llama = make(model, rotary, **IN_BATCHES)
        found = [trace(llama, PROMPT, 4)]
        llama.rotary_set_budget("100%")
        found.append(trace(llama, PROMPT, 4))
        return found, llama.rotary_stats()["notices"], None
    except (RotaryError, RuntimeError) as error:
        return [], [], f"{type(error).__name__}: {error}"
    finally:
        if llama is not None:
            llama.close()


def fail_each(model, rotary, most, in_turn):
    """Fail about `most` calls (`in_turn` "at") or sites ("site") one by one, with a normal run after each."""
    shortage = Shortage()
    shortage.begin()
    first = attempt(model, rotary)
    shortage.end()
    n = shortage.calls if in_turn == "at" else shortage.sites
    found = []
    for number in range(1, n + 1, max(n // most, 1)):
        shortage.begin(**{in_turn: number})
        became = attempt(model, rotary)
        if shortage.end() > 0:
            found.append((number, became, attempt(model, rotary)))
    return first, n, found


def check(result, stock, fallback):
    first, n, found = result
    assert first[0], first
    for number, (traces, notices, error), (after, _, error_after) in found:
        for paged in traces:
            assert_equal(paged, stock)
        if error is None:
            assert fallback is None or any(fallback in text for text in notices), (number, notices)
        else:
            assert "\n" not in error and error.count("; ") >= 1, error
        assert error_after is None, (number, error_after)
        for paged in after:
            assert_equal(paged, stock)
    return n


@pytest.mark.parametrize(
    ("function", "in_turn", "io", "fallback"),
    [
        ("pread", "at", "threads", None),  # a prefetch that failed is read again
        ("pread", "site", "threads", None),
        ("io_uring_setup", "at", "io_uring", "io_uring_setup: Cannot allocate memory"),
        ("io_uring_enter", "at", "io_uring", None),  # tried again
        ("io_uring_enter", "site", "io_uring", None),
        ("pthread_create", "at", "threads", "of 8 threads that read"),
        ("pthread_create", "site", "threads", "of 8 threads that read"),
    ],
)
def test_each_failure(native, synthetic, stock_trace, short_of, function, in_turn, io, fallback):
    if function.startswith("io_uring") and not has_io_uring():
        pytest.skip("no io_uring here")
    model = synthetic(type="q4_0", layers=2)
    stock = stock_trace(model, n_prompt=PROMPT, n_decode=4, **IN_BATCHES)
    environment = short_of(function, io)
    rotary = {"budget": "min", "store": "direct"}
    result = apart(fail_each, model, rotary, 12, in_turn, environment=environment)
    assert check(result, stock, fallback) > 0 and result[2], "nothing was to fail"


def fail_ring_threads(model, n_failing):
    load_late()
    shortage = Shortage()
    shortage.begin(at=1, n=n_failing)
    llama = make(model, {"inner": "LATE0", "budget": "50%", "pin": "off"}, n_gpu_layers=-1, n_ubatch=4)
    found = trace(llama, PROMPT, 4)
    return found, llama.rotary_stats()["notices"], shortage.end()


def test_threads_that_copy_cannot_be_started(native, synthetic, stock_trace, late, short_of):
    model = synthetic(type="q4_0", layers=2)
    options = {"n_ubatch": 4, "use_extra_bufts": False}
    stock = stock_trace(model, n_prompt=PROMPT, n_decode=4, **options)
    environment = {**late, **short_of("pthread_create")}
    paged, notices, n_failed = apart(fail_ring_threads, model, 1 << 20, environment=environment)
    assert n_failed > 0
    assert_equal(paged, stock)
    assert any("threads that copy" in text and "unavailable" in text for text in notices), notices
