# SPDX-License-Identifier: MIT
"""The panel of ``rotary run --live``: figures of a running model, drawn repeatedly at the cursor.

`frame` computes a frame from figures alone. `Panel` owns the terminal and one thread, which polls the
counters and draws; the thread that runs the model only makes a few assignments per token.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TextIO

from rich.cells import cell_len, chop_cells
from rich.live import Live
from rich.text import Text

from ..runtime.figures import Figures, Interval, prompt_share
from ..runtime.generation import Watcher
from ..runtime.llama import Llama
from ..units import clock, decimal, mib, percent, span
from .terminal import console, size

_INTERVAL_SECONDS = 0.25
_N_POLLS = 60  # columns of the sparkline
_N_TOKENS = 16  # "now" is the speed over the last so many
_N_TEXT_LINES = 6
_BAR_COLUMNS = 20
_LABEL_COLUMNS = 10
_TIMES = (  # what the computing thread spends time on: counter, name, colour
    ("stall_us", "stall", "red"),
    ("page_us", "paging", "yellow"),
    ("wait_us", "device", "blue"),
)


class Symbols(NamedTuple):
    """Characters that graphs are drawn with."""

    levels: str  # of a rate, from 0 to 1
    shares: str  # of time: stall, paging, device, the rest
    nothing: str  # no rate
    rule: str


UNICODE = Symbols("▁▂▃▄▅▆▇█", "█▓▒░", "·", "─")
ASCII = Symbols("_.:-=+*#", "#=-.", " ", "-")


class Tail:
    """The last lines of a growing text, broken between words. Earlier lines are dropped."""

    def __init__(self) -> None:
        self._text = ""  # begins at the start of a line

    def add(self, text: str) -> None:
        """Append text. Control characters, which could move the cursor, become spaces."""
        self._text += "".join(c if c.isprintable() or c == "\n" else " " for c in text)

    def lines(self, width: int) -> list[str]:
        """The last few lines, of at most `width` columns."""
        starts, column = [0], 0
        for found in re.finditer(r"\n| +|[^ \n]+", self._text):
            at, word = found.start(), found[0]
            if word == "\n":
                starts.append(found.end())
                column = 0
            elif word[0] == " ":
                column += len(word)  # spaces past the edge stay on the line
            else:
                if column > 0 and column + cell_len(word) > width:
                    starts.append(at)
                    column = 0
                *full, word = chop_cells(word, width)
                for part in full:
                    at += len(part)
                    starts.append(at)
                column += cell_len(word)
        # Dropping these lines does not change where later lines break.
        n_before = max(0, len(starts) - _N_TEXT_LINES)
        bounds = [start - starts[n_before] for start in (*starts[n_before:], len(self._text))]
        self._text = self._text[starts[n_before] :]
        return [self._text[start:end].rstrip() for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class View:
    """Content of a frame, without the text.

    Parameters
    ----------
    phase : str
        ``"loading"``, ``"prompt"`` or ``"tokens"``.
    seconds : float
        Seconds since the phase began.
    done : float or None
        Share of the phase that is done, 0 to 1.
    amount : str
        Progress in words, such as ``"45 of 128"``.
    now, average : float or None
        Tokens per second.
    model : str
        File name.
    figures : Figures or None
        None while the model loads.
    """

    phase: str
    seconds: float
    done: float | None = None
    amount: str = ""
    now: float | None = None
    average: float | None = None
    model: str = ""
    figures: Figures | None = None


def frame(view: View, tail: Tail, width: int, height: int, symbols: Symbols = UNICODE) -> list[Text]:
    """Draw at most `height` lines of at most `width` columns, with as many figures as fit."""
    above = [_rule(f"rotary {view.model}".rstrip(), width, symbols), *_progress(view, width, symbols)]
    # Last and short, because the terminal echoes typed keys after it.
    below = [Text("Ctrl-C stops and keeps the text", "dim")]
    if view.figures is not None:
        above += _figures(view.figures, width, symbols)
        # A fixed number of lines, so that nothing jumps; all but one line of text give way to figures.
        n_text = max(1, min(_N_TEXT_LINES, height - len(above) - len(below) - 1))
        text = tail.lines(width)[-n_text:]
        text += [""] * (n_text - len(text))
        below = [_rule("text", width, symbols), *map(Text, text), *below]
    return [_cut(line, width) for line in (*above[: max(1, height - len(below))], *below)][-height:]


def _progress(view: View, width: int, symbols: Symbols) -> list[Text]:
    parts = [_plain(clock(view.seconds))]
    if view.amount:
        parts.insert(0, _plain(view.amount))
    if view.done is not None:
        n_full = round(_BAR_COLUMNS * view.done)
        full, empty = symbols.shares[0], symbols.shares[-1]
        bar = Text.assemble((full * n_full, "green"), (empty * (_BAR_COLUMNS - n_full), "dim"))
        parts.insert(0, bar)
    rows = _row(view.phase, parts, width)
    if view.figures is not None:
        speeds = [_plain(f"{decimal(view.now)} now"), _plain(f"{decimal(view.average)} average")]
        rows += _row("tok/s", speeds, width)
    return rows


def _figures(figures: Figures, width: int, symbols: Symbols) -> list[Text]:
    stats, last, window = figures.stats, figures.last(), figures.window()
    n_notices = len(stats["notices"])
    notices = _plain(f"{n_notices} notice{'' if n_notices == 1 else 's'}")
    if not stats["active"]:
        return _row("not paged", [_plain(stats["reason"]), notices], width)
    n_columns = max(1, min(_N_POLLS, width - _LABEL_COLUMNS))
    hits = [_plain(f"{percent(last.hit_rate)} now"), _plain(f"{percent(stats['hit_rate'])} average")]
    spark = _levels(figures.hit_rates()[-n_columns:], symbols)
    spark.pad_left(n_columns - len(spark))  # the newest at the right
    rows = _row("hits", [*hits, spark], width)
    rows += _row("layers", _strip(window, max(1, width - _LABEL_COLUMNS), symbols), width)
    if stats["predicted"] or stats["prefetched"]:
        measures = ("accuracy", "coverage", "timeliness")
        rates = [_plain(f"{name} {percent(stats[f'prefetch_{name}'])}") for name in measures]
        rows += _row("prefetch", rates, width)
    rows += _row("time", _times(last, n_columns, symbols), width)
    moved = [_plain(f"paged {_speed(last, 'bytes_paged')}")]
    if stats["store"] == "direct":
        moved.append(_plain(f"disk {_speed(last, 'bytes_read')}"))
    rows += _row("moved", moved, width)
    each = [layer["n_slots"] for layer in stats["layers"]]
    slots = [
        f"{sum(layer['n_resident'] for layer in stats['layers'])} of {sum(each)} used",
        f"{span(each)} for {stats['n_expert']} experts a layer",
        f"on {stats['inner_device']}",
        f"policy {stats['policy']}",
    ]
    return rows + _row("slots", [*map(_plain, slots), notices], width)


def _strip(window: Interval, n_columns: int, symbols: Symbols) -> list[Text]:
    """Hit rates, one character per layer, and the lowest rate."""
    rates = window.layer_hit_rates
    strip = _levels(rates, symbols)
    parts = [strip[i : i + n_columns] for i in range(0, len(rates), n_columns)]
    known = [
        (rate, layer["il"])
        for rate, layer in zip(rates, window.after["layers"], strict=True)
        if rate is not None
    ]
    if known:
        rate, il = min(known)
        parts.append(_plain(f"lowest {percent(rate)} in layer {il}"))
    return [*parts, _plain(f"last {window.seconds:.0f} s")]


def _times(last: Interval, n_columns: int, symbols: Symbols) -> list[Text]:
    """Causes of the time spent, in words and as a bar."""
    shares = [last.share_of_time(counter) for counter, _, _ in _TIMES]
    shares.append(max(0.0, 1.0 - sum(shares)))
    shares = [share / sum(shares) for share in shares]
    names = [*((name, colour) for _, name, colour in _TIMES), ("rest", "green")]
    parts, bar, upto = [], Text(), 0.0
    for share, (name, colour), symbol in zip(shares, names, symbols.shares, strict=True):
        upto += share
        bar.append(symbol * (round(n_columns * upto) - len(bar)), colour)
        parts.append(Text.assemble((symbol, colour), f" {name} {percent(share, 0)}"))
    return [*parts, bar]


# ---- pieces


def _row(label: str, parts: Sequence[Text], width: int) -> list[Text]:
    """Put parts after a label; those that do not fit go to the next line."""
    rows = [Text.assemble((label.ljust(_LABEL_COLUMNS), "bold"))]
    for part in parts:
        if len(rows[-1]) > _LABEL_COLUMNS:
            if rows[-1].cell_len + 2 + part.cell_len > width:
                rows.append(Text(" " * _LABEL_COLUMNS))
            else:
                rows[-1].append("  ")
        rows[-1].append_text(part)
    return rows


def _levels(rates: Sequence[float | None], symbols: Symbols) -> Text:
    drawn = Text()
    for rate in rates:
        if rate is None:
            drawn.append(symbols.nothing, "dim")
        else:
            level = min(len(symbols.levels) - 1, int(rate * len(symbols.levels)))
            drawn.append(symbols.levels[level], "red" if rate < 0.5 else "yellow" if rate < 0.8 else "green")
    return drawn


def _rule(title: str, width: int, symbols: Symbols) -> Text:
    return Text(f"{symbols.rule * 2} {title} {symbols.rule * width}", "dim")


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line


def _plain(text: str) -> Text:
    return Text(text)


def _speed(interval: Interval, counter: str) -> str:
    n_bytes = interval.per_second(counter)
    return "-" if n_bytes is None else f"{mib(n_bytes)}/s"


# ---- the terminal


class Panel(Watcher):
    """Draws on a terminal until it is closed, then removes the panel.

    Anything written to ``sys.stderr`` meanwhile, such as log messages, appears above the panel.

    Parameters
    ----------
    out : file
        The terminal.
    keep_text : bool
        Write the text to standard output only at the end, because that is a terminal too.
    """

    def __init__(self, out: TextIO, keep_text: bool) -> None:
        self._out = out
        self._keep_text = keep_text
        self._pieces: list[str] = []
        self._tail = Tail()
        self._n_shown = 0  # number of pieces already in the tail
        self._loaded = 0.0
        self._llama: Llama | None = None
        self._n_prompt = self._n_made = self._n_predict = 0
        self._began = time.monotonic()  # start of the phase
        self._arrivals: deque[float] = deque(maxlen=_N_TOKENS + 1)
        self._console = console(out)
        self._symbols = ASCII if self._console.options.ascii_only else UNICODE
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=keep_text
        )
        self._over = False
        self._wake = threading.Event()  # a phase has begun, or it is over
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._live.start()
        self._thread.start()

    def close(self) -> None:
        """Restore the terminal, and write the text to standard output if it was kept back."""
        try:
            self._over = True
            self._wake.set()
            self._thread.join()
        finally:
            self._live.stop()
            if self._keep_text:
                sys.stdout.write("".join(self._pieces))
                sys.stdout.flush()

    # ---- called by the thread that runs the model

    def loading(self, fraction: float) -> None:
        self._loaded = fraction

    def prompt(self, llama: Llama, n_tokens: int) -> None:
        self._figures = Figures(llama, _N_POLLS)
        self._n_prompt = n_tokens
        self._began = time.monotonic()
        self._llama = llama  # set last, because the other thread tests it
        self._wake.set()

    def token(self, n_made: int, n_predict: int) -> None:
        self._arrivals.append(time.monotonic())
        self._n_predict = n_predict
        if n_made == 1:
            self._began = self._arrivals[0]
        self._n_made = n_made
        if n_made == 1:
            self._wake.set()

    def text(self, text: str) -> bool:
        self._pieces.append(text)
        return self._keep_text

    # ---- the thread that draws

    def _draw(self) -> None:
        while not self._over:
            view = self._look()  # may log, which waits for drawing
            while self._n_shown < len(self._pieces):
                self._tail.add(self._pieces[self._n_shown])
                self._n_shown += 1
            self._console.size = size(self._out)
            width, height = self._console.size
            # One line less than the terminal has, because the line feed after the panel must not scroll.
            drawn = frame(view, self._tail, width, height - 1, self._symbols)
            self._live.update(Text("\n").join(drawn), refresh=True)
            self._wake.wait(_INTERVAL_SECONDS)
            self._wake.clear()

    def _look(self) -> View:
        llama, n_made, now = self._llama, self._n_made, time.monotonic()
        if llama is None:
            return View("loading", now - self._began, self._loaded)
        self._figures.poll()
        model, seconds = os.path.basename(llama.model_path), max(0.0, now - self._began)
        if n_made == 0:
            done = prompt_share(llama, self._n_prompt, self._figures.stats)
            speed = None if done is None or seconds <= 0 else done * self._n_prompt / seconds
            return View("prompt", seconds, done, str(self._n_prompt), None, speed, model, self._figures)
        n_gaps = len(self._arrivals) - 1
        return View(
            "tokens", seconds, n_made / self._n_predict, f"{n_made} of {self._n_predict}",
            n_gaps / (now - self._arrivals[0]) if n_gaps else None,
            (n_made - 1) / seconds if n_made > 1 else None,
            model, self._figures,
        )  # fmt: skip
