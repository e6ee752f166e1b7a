# SPDX-License-Identifier: MIT
"""Live figures on a pseudo-terminal: what each phase shows, and that the line is cleared afterwards."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import sys
from types import SimpleNamespace

import pytest

from rotary_llamacpp.display import live
from rotary_llamacpp.runtime import figures
from tests.support.terminals import Terminal


class Model:
    """A stand-in for Llama with what Live reads: 4 layers, batches of 8 in graphs of 5 tokens."""

    n_batch = 8
    context_params = SimpleNamespace(n_ubatch=5)

    def __init__(self, **stats):
        self.stats = {
            "path": "slots",
            "n_layers": 4,
            "lookups": 0,
            "hit_rate": None,
            "store": "mmap",
            **stats,
        }

    def rotary_stats(self):
        return dict(self.stats)


@pytest.fixture
def terminal(monkeypatch):
    """Put stderr on a terminal; returns a function that waits for a text and returns the output up to it."""
    monkeypatch.setattr(live, "_INTERVAL_SECONDS", 0.01)
    with Terminal(n_columns=100) as made, os.fdopen(os.dup(made.theirs), "w", buffering=1) as stream:
        end = 0

        def shown_until(text):
            nonlocal end
            start, end = end, made.wait_for(re.escape(text), end)
            return made.text[start:end]

        def begin():  # to be called by the test: pytest replaces the stream between set-up and call
            monkeypatch.setattr(sys, "stderr", stream)
            return shown_until

        yield begin


def test_phases(terminal):
    shown_until = terminal()
    model = Model()
    with live.watching() as watcher:
        shown_until("loading: 0 %")
        watcher.loading(0.5)
        shown_until("loading: 50 %")
        watcher.prompt(model, 18)  # graphs of 5, 3, 5, 3 and 2 tokens, each with a lookup in 4 layers
        model.stats.update(lookups=10, hit_rate=0.25)
        shown = shown_until("prompt: 50 %")
        shown += shown_until("\r")
        assert "tok/s, hits 25.0 %" in shown and "disk" not in shown


def test_the_disks_speed_is_that_since_the_last_poll(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: next(seconds) / 2))
    model = Model(store="direct", bytes_read=0, hit_rate=0.5)
    polled = figures.Figures(model)
    model.stats["bytes_read"] = 1 << 30
    assert live.poll(polled) == ["hits 50.0 %", "disk 2048 MiB/s"]
    assert live.poll(polled) == ["hits 50.0 %", "disk 0 MiB/s"]


def test_no_share_is_shown_where_nothing_is_paged(terminal):
    shown_until = terminal()
    with live.watching() as watcher:
        watcher.prompt(Model(path="none", n_layers=0), 18)
        shown_until("prompt: 0:00")
        assert "%" not in shown_until("\r")


def test_tokens_are_shown_only_where_text_goes_elsewhere(terminal, monkeypatch):
    shown_until = terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with live.watching() as watcher:
        watcher.prompt(Model(), 5)
        shown_until("prompt: 0 %")
        for n_made in (1, 2):
            watcher.token(n_made, 4)
        shown_until("generating: 50 %")
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    with live.watching() as watcher:
        watcher.prompt(Model(), 5)
        shown_until("prompt: 0 %")
        watcher.token(1, 4)
        sys.stderr.write("the text\n")
        assert shown_until("the text\r\n").endswith("\x1b[2Kthe text\r\n"), "begins on a clear line"
        assert watcher._thread is None


def test_log_lines_begin_on_a_clear_line(terminal):
    shown_until = terminal()
    with live.watching():
        shown_until("loading:")
        logging.getLogger("rotary_llamacpp").addHandler(handler := logging.StreamHandler(sys.stderr))
        logging.getLogger("rotary_llamacpp").warning("a notice")
        assert "\x1b[2Ka notice\r\n" in shown_until("a notice\r\n")
        shown_until("loading:")
    logging.getLogger("rotary_llamacpp").removeHandler(handler)
    assert "handle" not in vars(logging.getLogger("rotary_llamacpp"))


def test_nothing_without_a_terminal(terminal, monkeypatch):
    terminal()
    with live.watching(off=True) as watcher:
        assert watcher is None
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with live.watching() as watcher:
        assert watcher is None
