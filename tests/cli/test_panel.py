# SPDX-License-Identifier: MIT
"""The panel: frames from made-up figures at several widths, and runs on a pseudo-terminal, after which only
log messages and the text are left on the screen."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from rotary_llamacpp.display import live, panel
from rotary_llamacpp.display.panel import ASCII, UNICODE, Tail, View, frame
from rotary_llamacpp.runtime import figures
from rotary_llamacpp.runtime.figures import Figures
from tests.support import HANG_S, ROOT
from tests.support.terminals import Terminal

RUN = ("-p", "In the beginning", "-n", "400", "--budget", "25%", "--temp", "0", "--threads", "1")
ALWAYS = ("tokens", "tok/s", "hits", "layers", "time", "moved", "slots")


# ---- frames


class Model:
    """A stand-in for Llama with made-up counters.

    In each step every layer il has 8 requests and il mod 9 hits, except the last, which has none.
    """

    model_path = "/models/made-up.gguf"
    n_batch = 8
    context_params = SimpleNamespace(n_ubatch=8)

    def __init__(self, n_layers, **stats):
        self.n_layers = n_layers
        self.n_steps = 0
        self.stats = {
            "active": True, "reason": None, "path": "slots", "store": "direct", "policy": "recall",
            "inner_device": "CPU", "n_layers": n_layers, "n_slots": 8, "n_expert": 32, "notices": ["a", "b"],
            "predicted": 9, "prefetched": 9, "prefetch_accuracy": 0.5, "prefetch_coverage": 0.25,
            "prefetch_timeliness": None, "lookups": 0, **stats,
        }  # fmt: skip

    def rotary_stats(self):
        n = self.n_steps
        layers = [
            {"il": il, "n_slots": 8, "n_resident": 7, "requests": 8 * n, "hits": n * (il % 9)}
            for il in range(self.n_layers)
        ]
        layers[-1].update(requests=0, hits=0)
        hits, requests = (sum(layer[name] for layer in layers) for name in ("hits", "requests"))
        # A step takes a second, of which 250 ms are stall, 125 ms paging, 62.5 ms waiting for a device.
        moved = {"bytes_paged": n << 20, "bytes_read": n << 21}
        spent = {"stall_us": 250_000 * n, "page_us": 125_000 * n, "wait_us": 62_500 * n}
        rate = hits / requests if requests else None
        return {
            **self.stats, **moved, **spent, "hits": hits, "requests": requests, "hit_rate": rate,
            "layers": layers,
        }  # fmt: skip


@pytest.fixture
def shown(monkeypatch):
    """Make a frame after some polls, as lines of text; checks that it fits the terminal."""

    def make(model, width, height=60, n_polls=3, symbols=UNICODE, text="", **view):
        now = SimpleNamespace(now=0.0)
        monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: now.now))
        polled = Figures(model, 60)
        for _ in range(n_polls):
            model.n_steps += 1
            now.now += 1
            polled.poll()
        tail = Tail()
        tail.add(text)
        given = {"phase": "tokens", "seconds": 75.0, "done": 0.5, "amount": "64 of 128", "now": 28.51}
        what = View(**{**given, "model": "made-up.gguf", "figures": polled, **view})
        drawn = [line.plain for line in frame(what, tail, width, height, symbols)]
        assert len(drawn) <= height and all(cell_len(line) <= width for line in drawn)
        return drawn

    return make


@pytest.mark.parametrize("n_layers", [1, 48, 94])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_figure_is_in_the_frame(shown, width, n_layers):
    drawn = shown(Model(n_layers), width, text="It was.")
    said = " ".join(drawn)
    for label in (*ALWAYS, "prefetch"):
        assert sum(line.startswith(label) for line in drawn) == 1, label
    for part in (
        "made-up.gguf", "64 of 128", "1:15", "28.5 now", "- average", "accuracy 50.0 %", "coverage 25.0 %",
        "timeliness -", "stall 25 %", "paging 12 %", "device 6 %", "rest 56 %", "paged 1.0 MiB/s",
        "disk 2.0 MiB/s", f"{7 * n_layers} of {8 * n_layers} used", "8 for 32 experts a layer", "on CPU",
        "policy recall", "2 notices", "It was.",
    ):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize("n_layers", [1, 48, 94])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_character_for_each_layer(shown, width, n_layers):
    drawn = shown(Model(n_layers), width)
    first = next(i for i, line in enumerate(drawn) if line.startswith("layers"))
    rows = [line[10:] for line in drawn[first : first + -(-n_layers // (width - 10))]]
    strip = "".join(rows)[: n_layers + 1].partition(" ")[0]
    # There are eight levels: 8 of 8 is as high as 7 of 8.
    levels = [UNICODE.levels[min(7, il % 9)] for il in range(n_layers - 1)]
    assert strip == "".join(levels) + UNICODE.nothing
    assert ("lowest 0.0 % in layer 0" in " ".join(drawn)) == (n_layers > 1)


def test_the_sparkline_has_a_character_for_each_poll(shown):
    model = Model(2)
    assert " " * 57 + "▁▁▁" in shown(model, 200)[3]
    # 0 to 8 hits of 8 in nine layers are half on average: the fifth of eight levels.
    assert shown(Model(10), 200, n_polls=70)[3].endswith("average  " + "▅" * 60)
    assert " " * 10 + "▅" * 30 in shown(Model(10), 40, n_polls=70), "the last that fit"
    assert shown(Model(1), 200)[3].endswith("···"), "not one request"
    assert "- now  - average" in shown(Model(1), 200)[3]


def test_the_bar_of_times_is_as_long_as_the_sparkline(shown):
    bar = "█" * 15 + "▓" * 7 + "▒" * 4 + "░" * 34  # 15, 7.5 and 3.75 of 60, rest
    assert any(line.endswith(bar) for line in shown(Model(3), 200))
    # A stall is counted when it ends, even if it began before the last poll: shares never exceed the time.
    longer = Model(3)
    counted = longer.rotary_stats
    longer.rotary_stats = lambda: {**counted(), "stall_us": 9_812_500 * longer.n_steps}
    assert "█ stall 98 %  ▓ paging 1 %  ▒ device 1 %  ░ rest 0 %" in " ".join(shown(longer, 200))


def test_what_does_not_apply_is_left_out(shown):
    said = " ".join(shown(Model(4, store="mmap", predicted=0, prefetched=0), 80))
    assert "disk" not in said and "prefetch" not in said and "paged 1.0 MiB/s" in said
    said = " ".join(shown(Model(4, active=False, reason="rotary is off", notices=["one"]), 80))
    assert "not paged rotary is off  1 notice" in said and "layers" not in said


def test_loading_shows_how_far_it_is():
    drawn = [line.plain for line in frame(View("loading", 3.0, 0.25), Tail(), 80, 24)]
    assert drawn[1] == "loading   " + "█" * 5 + "░" * 15 + "  0:03" and len(drawn) == 3


@pytest.mark.parametrize("width", [1, 2, 9, 11, 20])
@pytest.mark.parametrize("height", [1, 2, 5, 9, 15])
def test_small_terminals_are_never_exceeded(shown, width, height):
    shown(Model(94), width, height, text="words and 漢字 " * 50)


def test_little_room_is_taken_from_the_text_first(shown):
    everything = shown(Model(6), 80, 40, text="one\ntwo\nthree")
    fewer = shown(Model(6), 80, len(everything) - 4, text="one\ntwo\nthree")
    assert len(fewer) == len(everything) - 4 and fewer[-3:-1] == ["two", "three"]
    least = shown(Model(6), 80, 8, text="one\ntwo\nthree")
    assert least[-2] == "three" and least[2].startswith("tok/s") and len(least) == 8


def test_without_unicode(shown):
    assert "".join(shown(Model(94), 80, symbols=ASCII)).isascii()


# ---- the text


def test_the_text_is_broken_between_words():
    tail = Tail()
    tail.add("In the beginning  was\n\n  the word-that-is-too-long 漢字漢字漢字\x1b[2J")
    # Wide characters take two columns; the escape character is replaced, as it could clear the screen.
    assert tail.lines(10)[-6:] == ["  the", "word-that-", "is-too-lon", "g", "漢字漢字漢", "字 [2J"]
    assert len(tail.lines(10)) == 6


@pytest.mark.parametrize("width", [1, 7, 40])
def test_text_that_comes_piece_by_piece_is_broken_as_if_it_came_at_once(width):
    text = "Of the 漢字 house\tof God:  for the LORD\nhath spoken, incomprehensibilities.\n\n" * 9
    whole, pieces = Tail(), Tail()
    whole.add(text)
    for character in text:
        pieces.add(character)
        pieces.lines(width)
    assert pieces.lines(width) == whole.lines(width)
    assert all(cell_len(line) <= max(width, 2) for line in whole.lines(width))
    assert len(pieces._text) <= 6 * (width + 2), "what has scrolled away is not kept"


# ---- on a terminal


def screen(raw: str, columns: int) -> list[str]:
    """The lines that a terminal of so many columns and any height shows after the output `raw`."""
    rows, y, x = [""], 0, 0
    for found in re.finditer(r"\x1b\[(\??)(\d*)(?:;\d+)*([A-Za-z])|\r|\n|[^\x1b\r\n]", raw):
        private, number, command = found.groups()
        if command == "A":
            y -= int(number)
            assert y >= 0, "above the top"
        elif command == "K":
            assert number == "2"
            rows[y] = ""
        elif command is not None:
            assert private or command == "m", found[0]
        elif found[0] == "\r":
            x = 0
        elif found[0] == "\n":
            y += 1
        else:
            if x == columns:
                x, y = 0, y + 1
            rows += [""] * (y + 1 - len(rows))
            rows[y] = rows[y].ljust(x)[:x] + found[0] + rows[y][x + 1 :]
            x += 1
        rows += [""] * (y + 1 - len(rows))
    return rows


def test_the_screen_of_these_tests():
    assert screen("ab\r\ncdefg\x1b[1A\x1b[2K\rx\x1b[?25l\x1b[1;2m", 3) == ["ab", "x", "fg"]


class Running:
    """``rotary run`` in a process of its own, on a terminal."""

    def __init__(self, terminal, *arguments, stdout=None, term="xterm"):
        self.terminal = terminal
        command = [sys.executable, "-m", "rotary_llamacpp", "run", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": term}
        streams = {"stdin": terminal.theirs, "stdout": stdout or terminal.theirs, "stderr": terminal.theirs}
        self.process = subprocess.Popen(command, env=env, **streams)
        terminal.callback(self.process.kill)

    def finish(self):
        returncode = self.process.wait(HANG_S)
        self.terminal.flush()
        # The terminal is restored: its modes are as before, and the cursor is shown.
        assert termios.tcgetattr(self.terminal.theirs) == self.terminal.before
        assert self.terminal.text.count("\x1b[?25l") == self.terminal.text.count("\x1b[?25h")
        return returncode


@pytest.fixture
def terminal():
    with Terminal() as made:
        yield made


def lines_of(text, columns=80):
    """The lines that a terminal shows of a text."""
    return screen(text.replace("\n", "\r\n"), columns)


def test_a_run_prints_what_it_prints_without(native, tiny_model, rotary_command, terminal):
    plain = rotary_command("run", tiny_model, *RUN)
    assert plain.returncode == 0, plain.stderr
    assert Running(terminal, tiny_model, *RUN, "--live").finish() == 0
    drawn, _, after = terminal.text.rpartition("\x1b[?25h")
    for label in ALWAYS:
        assert f"\x1b[1m{label}" in drawn, label
    assert re.search(r"[1-9]\d* of 400", drawn) and "recall" in drawn
    # Nothing of the panel is left: the screen has the announcement, the text and the figures.
    announced, _ = plain.stderr.splitlines()
    left = screen(terminal.text, 80)
    expected = lines_of(f"{announced}\n{plain.stdout}")
    assert left[: len(expected) - 1] == expected[:-1]
    said = "".join(left[len(expected) - 1 :])
    assert said.startswith("rotary: 400 tokens at") and said.endswith(" on CPU")
    assert plain.stdout.replace("\n", "\r\n") in after


def test_text_that_goes_elsewhere_streams_there(native, tiny_model, rotary_command, terminal, tmp_path):
    with (tmp_path / "text").open("wb") as out:
        assert Running(terminal, tiny_model, *RUN, "--live", stdout=out).finish() == 0
    assert (tmp_path / "text").read_text() == rotary_command("run", tiny_model, *RUN).stdout
    drawn, _, after = terminal.text.rpartition("\x1b[?25h")
    assert "layers" in drawn and " text " in drawn
    assert "rotary: 400 tokens" in after


def test_ctrl_c_keeps_the_text_and_clears_the_screen(native, synthetic, terminal):
    model = synthetic(layers=16, type="q8_0", vocab=4096)
    run = Running(  # greedily: random sampling would sometimes end the text early
        terminal, model, "-p", "abc", "-n", 4000, "--temp", 0, "--budget", "min", "--threads", 1, "--live"
    )
    terminal.wait_for(r"[1-9]\d* of 4000")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    left = screen(terminal.text, 80)
    assert not any(line.startswith(("──", *ALWAYS, "Ctrl-C")) for line in left)
    assert "rotary: " in terminal.text.rpartition("\x1b[?25h")[2] and "Traceback" not in terminal.text
    n_made = int(re.search(r"rotary: (\d+) tokens", terminal.text)[1])
    assert 0 < n_made < 4000
    assert len(left) > 3, "announcement, text, figures"


def test_without_a_terminal_one_line_says_so(native, tiny_model, rotary_command):
    with_, without = (rotary_command("run", tiny_model, *RUN, *option) for option in (["--live"], []))
    assert with_.returncode == 0 and with_.stdout == without.stdout
    warned, *others = with_.stderr.splitlines()
    assert warned.startswith("--live: no panel, standard error is not a terminal; ") and len(others) == 2
    assert warned.count(";") == 1


def test_a_dumb_terminal_is_none(native, tiny_model, terminal):
    assert Running(terminal, tiny_model, *RUN, "--live", term="dumb").finish() == 0
    assert "--live: no panel, TERM is dumb; " in terminal.text and "\x1b[1mhits" not in terminal.text


@pytest.mark.parametrize("other", ["--verbose", "--json", "--no-progress"])
def test_options_that_leave_no_room(rotary_command, tiny_model, other):
    ran = rotary_command("run", tiny_model, "-p", "x", "--live", other)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("rotary: --live: ") and ran.stderr.count("\n") == 1
    assert other in ran.stderr


def test_log_messages_appear_above(terminal, monkeypatch):
    """Log messages, some longer than a line, arrive while another thread draws a panel of changing height."""
    monkeypatch.setattr(panel, "_INTERVAL_SECONDS", 0.002)
    stderr = os.fdopen(os.dup(terminal.theirs), "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("rotary_llamacpp")
    handler = logging.StreamHandler()
    handler.setStream(SimpleNamespace(write=lambda text: sys.stderr.write(text), flush=lambda: None))
    logger.addHandler(handler)
    model, messages = Model(48), []
    try:
        with live.watching(panel=True) as watcher:
            assert sys.stderr is not stderr
            for i in range(40):
                if i == 20:
                    watcher.prompt(model, 8)
                if i > 20:
                    watcher.token(i - 20, 20)
                    watcher.text(f"word {i}\n")
                model.n_steps += 1
                messages.append(f"notice {i}, " + "long " * (i % 3 * 12) + "end")
                logger.warning(messages[-1])
                if i % 3:  # the others come before the panel is drawn again
                    terminal.wait_for("Ctrl-C stops", len(terminal.text))
            terminal.wait_for("19 of 20")
            assert "\x1b[1mlayers" in terminal.text
        assert sys.stderr is stderr
    finally:
        logger.removeHandler(handler)
        stderr.close()
    terminal.flush()
    assert "".join(screen(terminal.text, 80)) == "".join(messages)
