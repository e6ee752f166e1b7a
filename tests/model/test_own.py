# SPDX-License-Identifier: MIT
"""What policies and predictors written in Python, and log callbacks, may do while the library calls them.

They raise, are interrupted by Ctrl-C, read statistics while another thread changes the model, and try to
change it themselves. Tests that could hang run in a process of their own.
"""

from __future__ import annotations

import ctypes
import signal
import threading

import numpy as np
import pytest

from rotary_llamacpp import policies, predictors
from rotary_llamacpp.errors import DeviceError
from rotary_llamacpp.native import replay as _replay
from tests.support.paged import make
from tests.support.processes import apart

pytestmark = pytest.mark.model

DIRECT = {"store": "direct", "budget": "25%"}
TOKENS = list(range(20, 60))


def logits(llama):
    """Logits of TOKENS, evaluated one by one so that lookups page and predict."""
    llama.reset()
    for token in TOKENS:
        llama.eval([token])
    return llama.scores[: len(TOKENS)].copy()


@pytest.fixture
def expected(native, tiny_model):
    llama = make(tiny_model, {"budget": "25%", "policy": "lru"})
    yield logits(llama)
    llama.close()


# ---- raising


class Fails(policies.Lru):
    """A policy that raises at its first choice in each layer."""

    def choose(self, candidates):
        if not self.shared.setdefault(("failed", self.layer), False):
            self.shared["failed", self.layer] = True
            raise LookupError(f"no idea in layer {self.layer}")
        return super().choose(candidates)


def test_an_exception_is_raised_once(native, tiny_model, expected):
    llama = make(tiny_model, {"budget": "25%", "policy": Fails})
    with pytest.raises(LookupError, match="no idea in layer") as failed:
        logits(llama)
    assert np.array_equal(logits(llama), expected)
    stats = llama.rotary_stats()
    assert stats["policy"] == "lru" and stats["evictions"] > 0
    [notice] = stats["notices"]
    assert notice == f"Fails: raised LookupError: {failed.value}; lru replaces it"
    llama.rotary_set_budget("min")
    assert np.array_equal(logits(llama), expected)
    llama.close()


def test_it_is_raised_once_in_a_replay(native):
    class FailsOnce(policies.Lru):
        def choose(self, candidates):
            raise LookupError("no idea")

    cache = _replay.Cache(native, FailsOnce, 8, [2])
    cache.resolve(0, np.array([[0, 1]], np.int32))
    with pytest.raises(LookupError, match="no idea"):
        cache.resolve(0, np.array([[2]], np.int32))
    assert [load[2] for load in cache.resolve(0, np.array([[3]], np.int32))] == [1], "the least recently used"


class NamesNothing(predictors.Previous):
    def name(self, layer, ahead, n):
        raise LookupError("no idea")


def test_a_predictors_exception_is_raised_once(native, tiny_model, expected):
    llama = make(tiny_model, {**DIRECT, "prefetch": NamesNothing})
    with pytest.raises(LookupError, match="no idea"):
        logits(llama)
    assert np.array_equal(logits(llama), expected)
    stats = llama.rotary_stats()
    assert stats["predictor"] == "" and any(
        text == "NamesNothing: raised LookupError: no idea; nothing is prefetched from now on"
        for text in stats["notices"]
    )
    llama.close()


# ---- Ctrl-C


class Interrupted:
    """Patch a method of a policy or predictor: Ctrl-C comes at its nth call, before or after its work."""

    def __init__(self, monkeypatch, kind, method, nth, before):
        self.n_calls = 0
        stock = getattr(kind, method)

        def call(policy, *args):
            self.n_calls += 1
            if self.n_calls == nth and before:
                signal.raise_signal(signal.SIGINT)
            found = stock(policy, *args)
            if self.n_calls == nth:
                signal.raise_signal(signal.SIGINT)
            return found

        monkeypatch.setattr(kind, method, call)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("method", ["note", "enter", "leave", "choose"])
@pytest.mark.parametrize("name", ["lru", "sieve", "s3fifo", "arc", "recall"])
def test_a_policy_goes_on_after_ctrl_c(native, tiny_model, expected, monkeypatch, name, method, before):
    policy = policies.REFERENCES[name]
    llama = make(tiny_model, {"budget": "25%", "policy": policy})
    met = Interrupted(monkeypatch, policy, method, 70, before)
    with pytest.raises(KeyboardInterrupt):
        logits(llama)
    assert np.array_equal(logits(llama), expected)
    assert met.n_calls > 200, "it is called as before"
    stats = llama.rotary_stats()
    assert stats["policy"] == policy.__name__ and stats["notices"] == []
    llama.close()


@pytest.mark.parametrize("method", ["note", "name"])
def test_a_predictor_goes_on_after_ctrl_c(native, tiny_model, expected, monkeypatch, method):
    llama = make(tiny_model, {**DIRECT, "prefetch": predictors.Previous})
    met = Interrupted(monkeypatch, predictors.Previous, method, 7, True)
    with pytest.raises(KeyboardInterrupt):
        logits(llama)
    n_calls = met.n_calls
    assert np.array_equal(logits(llama), expected)
    assert met.n_calls > n_calls and llama.rotary_stats()["predictor"] == "Previous"
    llama.close()


# ---- asking


def ask_while_the_budget_changes(model):
    """Read statistics in a policy while another thread, which changes the budget, waits for the graph."""
    asked, changing, found = threading.Event(), threading.Event(), []

    class Asks(policies.Lru):
        def note(self, ids, weights):
            super().note(ids, weights)
            if not asked.is_set() and found:
                asked.set()
                assert changing.wait(60)
                found.append(llama.rotary_stats()["lookups"])

    llama = make(model, {"budget": "25%", "policy": Asks})
    set_budget = llama._rotary.pools.set_budget

    def change(budget):
        changing.set()
        set_budget(budget)

    llama._rotary.pools.set_budget = change
    thread = threading.Thread(target=lambda: asked.wait(60) and llama.rotary_set_budget("50%"))
    thread.start()
    found.append(llama.rotary_stats()["lookups"])
    llama.eval([5, 6, 7])
    thread.join()
    found.append(llama.rotary_stats()["n_slots"])
    llama.eval([5, 6, 7])
    llama.close()
    return found


def test_a_policy_may_ask_for_figures_at_any_time(native, tiny_model):
    assert apart(ask_while_the_budget_changes, tiny_model) == [0, 0, 16]


def change_from_within(model):
    """Try to change the model from its own policy; returns the errors, and the slots after a later change."""
    found = []

    class Changes(policies.Lru):
        def note(self, ids, weights):
            if not found:
                pools = llama._rotary.pools
                for change in (
                    lambda: llama.rotary_set_budget("50%"), pools.prepare, lambda: pools.trace(True)
                ):  # fmt: skip
                    try:
                        change()
                        found.append("nothing")
                    except DeviceError as error:
                        found.append(str(error))
            super().note(ids, weights)

    llama = make(model, {"budget": "25%", "policy": Changes})
    llama.eval([5, 6, 7])
    llama.rotary_set_budget("50%")
    llama.eval([8])
    return found, llama.rotary_stats()["n_slots"]


def test_changes_from_within_are_refused(native, tiny_model):
    found, n_slots = apart(change_from_within, tiny_model)
    assert len(found) == 3 and all("between runs" in text for text in found) and n_slots == 16


def listen(model):
    """Messages seen by a log callback that reads statistics, and makes a failing call, for each message."""
    import llama_cpp

    said, lib = [], None

    @llama_cpp.llama_log_callback
    def hear(level, text, _):
        if lib is None or b"rotary: " not in text:
            return
        figures, layer = lib.ffi.new("rotary_stats *"), lib.ffi.new("rotary_layer_stats *")
        assert lib.c.rotary_pool_stats(pool, figures) == 0
        if b"layer -1" in text:
            lib.c.rotary_pool_layer_stats(pool, 999, layer)  # fails too, and is logged here
        said.append(text.decode())

    llama = make(model, {"budget": "25%"})
    pools = llama._rotary.pools
    lib, pool = pools.lib, pools._pools[0]._pool
    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    llama.rotary_set_budget("50%")
    llama.eval([5])
    layer = lib.ffi.new("rotary_layer_stats *")
    status = lib.c.rotary_pool_layer_stats(pool, -1, layer)
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    return said, status, lib.last_error()


def test_a_log_callback_may_ask(native, tiny_model):
    said, status, error = apart(listen, tiny_model)
    assert any("paged on CPU, budget 50%" in text for text in said)
    assert status == -1 and error.startswith("layer -1: not one of")
