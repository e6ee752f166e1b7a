# SPDX-License-Identifier: MIT
"""Polled counters: differences between polls, rates that are None, and the progress of a prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rotary_llamacpp.runtime import figures
from rotary_llamacpp.runtime.figures import Figures, n_ubatches, prompt_share


class Model:
    """A stand-in for Llama with settable counters: 2 layers, batches of 8 in graphs of 5 tokens."""

    n_batch = 8
    context_params = SimpleNamespace(n_ubatch=5)

    def __init__(self):
        self.of_layers = [[0, 0], [0, 0]]  # requests, hits
        self.stall_us = self.lookups = 0

    def rotary_stats(self):
        layers = [{"requests": requests, "hits": hits} for requests, hits in self.of_layers]
        total = {name: sum(layer[name] for layer in layers) for name in ("requests", "hits")}
        counters = {"stall_us": self.stall_us, "lookups": self.lookups}
        return {**total, **counters, "layers": layers, "path": "slots", "n_layers": 2}


@pytest.fixture
def clock(monkeypatch):
    """The clock that polls read, in seconds; set `now`."""
    seconds = SimpleNamespace(now=10.0)
    monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: seconds.now))
    return seconds


def test_each_interval_has_its_own_rates(clock):
    model = Model()
    polled = Figures(model, n_polls=3)
    assert polled.last().seconds == 0 and polled.last().per_second("hits") is None

    clock.now, model.of_layers, model.stall_us = 10.5, [[4, 1], [4, 2]], 125_000
    first = polled.poll()
    assert first.seconds == 0.5 and first.per_second("requests") == 16
    assert first.hit_rate == 3 / 8 and first.layer_hit_rates == [1 / 4, 2 / 4]
    assert first.share_of_time("stall_us") == 0.25

    clock.now, model.of_layers = 11.0, [[8, 5], [4, 2]]
    second = polled.poll()
    assert second.hit_rate == 1 and second.layer_hit_rates == [1, None], "not one request is no rate"
    assert second.share_of_time("stall_us") == 0

    clock.now = 12.0
    assert polled.poll().hit_rate is None
    assert polled.hit_rates() == [3 / 8, 1, None]
    assert polled.window().seconds == 2 and polled.window().hit_rate == 7 / 12
    clock.now = 13.0
    polled.poll()
    assert polled.hit_rates() == [1, None, None], "the oldest is forgotten"
    assert polled.window().layer_hit_rates == [1, None]
    assert polled.stats["hits"] == 7


def test_prompt_share():
    model = Model()
    # 18 tokens are graphs of 5, 3, 5, 3 and 2 tokens, each with a lookup in each of 2 layers.
    for model.lookups, share in ((0, 0), (5, 0.5), (10, 1), (12, 1)):
        assert prompt_share(model, 18, model.rotary_stats()) == share
    assert prompt_share(model, 18, {"path": "mapped"}) is None


@pytest.mark.parametrize(("n_tokens", "n_graphs"), [(1, 1), (5, 1), (6, 2), (8, 2), (9, 3), (18, 5)])
def test_n_ubatches(n_tokens, n_graphs):
    assert n_ubatches(Model(), n_tokens) == n_graphs
