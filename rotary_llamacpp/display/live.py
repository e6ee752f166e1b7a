# SPDX-License-Identifier: MIT
"""Live figures of ``rotary run`` in one line on a terminal. The panel is in panel.py.

The line is drawn while the model loads and computes the prompt, and while it generates only if standard
output is not a terminal, since text streams there otherwise. One thread per phase polls the counters and
draws; it is joined before the next phase and before text appears.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.live import Live as Drawn
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..errors import RotaryError
from ..runtime.figures import Figures, prompt_share
from ..runtime.generation import Watcher
from ..runtime.llama import Llama
from ..units import clock, mib, percent
from .terminal import console, size

_INTERVAL_SECONDS = 0.25
_BAR_COLUMNS = 24
# Share of the phase that is done, None if unknown; and texts of figures.
_Progress = tuple[float | None, list[str]]


@contextlib.contextmanager
def watching(off: bool = False, panel: bool = False) -> Iterator[Watcher | None]:
    """Yield a watcher that draws on standard error; None if that is not a terminal, or if `off`.

    Parameters
    ----------
    panel : bool
        Draw the panel instead of the line; warn if the terminal cannot show it.

    Raises
    ------
    RotaryError
        Both `off` and `panel` are set.
    """
    if off and panel:
        raise RotaryError("--live: cannot be combined with --no-progress, --json or --verbose; leave one out")
    if panel and (reason := _why_no_panel()):
        logging.getLogger("rotary_llamacpp").warning(
            "--live: no panel, %s; run in a terminal that can move the cursor, or leave --live out",
            reason,
        )
        panel = False
    if off or not sys.stderr.isatty():
        yield None
        return
    also_tokens = not sys.stdout.isatty()
    # llama_cpp redirects standard error while it loads.
    descriptor = os.dup(sys.stderr.fileno())
    with os.fdopen(descriptor, "w", encoding=sys.stderr.encoding, errors="replace") as out:
        closing: contextlib.AbstractContextManager[Watcher]
        if panel:
            from .panel import Panel

            closing = contextlib.closing(Panel(out, keep_text=not also_tokens))
        else:
            closing = contextlib.closing(Live(out, also_tokens))
        with closing as watcher:
            yield watcher


def _why_no_panel() -> str | None:
    if not sys.stderr.isatty():
        return "standard error is not a terminal"
    kind = os.environ.get("TERM")
    return f"TERM is {kind}" if kind in ("dumb", "unknown") else None


class Live(Watcher):
    """Draws one line at the cursor, and removes it at the end.

    Parameters
    ----------
    out : file
        The terminal.
    also_tokens : bool
        Also draw while tokens are generated.
    """

    def __init__(self, out: TextIO, also_tokens: bool) -> None:
        self._out = out
        self._also_tokens = also_tokens
        self._loaded = 0.0
        self._n_made = 0
        self._console = console(out)
        self._drawn: Drawn | None = None
        self._phase_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawing = threading.RLock()  # reentrant, because a log handler may log
        self._logger = logging.getLogger("rotary_llamacpp")
        self._handle = self._logger.handle
        self._logger.handle = self._make_way  # type: ignore[method-assign]
        self._start("loading", lambda seconds: (self._loaded, []))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop()
        del self._logger.handle  # uncovers the method of the class

    # ---- phases

    def loading(self, fraction: float) -> None:
        self._loaded = fraction

    def prompt(self, llama: Llama, n_tokens: int) -> None:
        figures = Figures(llama)

        def progress(seconds: float) -> _Progress:
            parts = poll(figures)
            done = prompt_share(llama, n_tokens, figures.stats)
            return done, parts if done is None else [f"{done * n_tokens / seconds:.1f} tok/s", *parts]

        self._n_made = 0
        self._figures = figures
        self._start("prompt", progress)

    def token(self, n_made: int, n_predict: int) -> None:
        self._n_made = n_made
        if n_made > 1:
            return
        self._stop()
        if self._also_tokens:

            def progress(seconds: float) -> _Progress:
                speed = f"{(self._n_made - 1) / seconds:.1f} tok/s"
                return self._n_made / n_predict, [speed, *poll(self._figures)]

            self._start("generating", progress)

    # ---- drawing

    def _start(self, name: str, progress: Callable[[float], _Progress]) -> None:
        self._stop()
        self._phase_over.clear()
        self._thread = threading.Thread(target=self._draw, args=(name, progress), daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        if self._thread is not None:
            self._phase_over.set()
            self._thread.join()
            self._thread = None

    def _draw(self, name: str, progress: Callable[[float], _Progress]) -> None:
        start = time.monotonic()
        while not self._phase_over.wait(_INTERVAL_SECONDS):  # a shorter phase shows nothing
            seconds = time.monotonic() - start
            done, parts = progress(seconds)  # may log, so not under the lock
            line = Table.grid(padding=(0, 1))
            share: list[str | ProgressBar] = []
            if done is not None:
                share = [percent(done, 0), ProgressBar(1.0, done, width=_BAR_COLUMNS)]
            line.add_row(f"{name}:", *share, clock(seconds), ", ".join(parts))
            with self._drawing:
                self._console.size = size(self._out)
                if self._drawn is None:
                    self._drawn = Drawn(
                        console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                        redirect_stderr=False,
                    )  # fmt: skip
                    self._drawn.start()
                self._drawn.update(line, refresh=True)
        with self._drawing:
            self._clear()

    def _clear(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None

    def _make_way(self, record: logging.LogRecord) -> None:
        """Clear the line and handle a record of our logger; nothing is drawn meanwhile."""
        with self._drawing:
            self._clear()
            self._handle(record)


def poll(figures: Figures) -> list[str]:
    """Poll; return texts such as ``["hits 81.2 %", "disk 812 MiB/s"]``, the latter since the last poll."""
    since = figures.poll()
    parts = []
    if figures.stats["hit_rate"] is not None:
        parts.append(f"hits {percent(figures.stats['hit_rate'])}")
    if figures.stats["store"] == "direct":
        parts.append(f"disk {mib(since.per_second('bytes_read') or 0, 0)}/s")
    return parts
