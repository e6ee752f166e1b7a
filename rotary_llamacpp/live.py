# SPDX-License-Identifier: MIT
"""Live figures of ``rotary run`` on a terminal: while loading, during the prompt, and while generating where
standard output is not a terminal too, since text streams there.

One thread per phase polls the counters and draws; it is joined before the next phase and before text appears.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from .config import MIB
from .generation import Watcher
from .llama import Llama

_INTERVAL_SECONDS = 0.25
_Progress = tuple[float | None, list[str]]  # what is done of the phase, 0 to 1, None if unknown; figures


@contextlib.contextmanager
def watching(off: bool = False) -> Iterator[Watcher | None]:
    """A watcher that draws on standard error; None if that is no terminal, or `off`."""
    if off or not sys.stderr.isatty():
        yield None
        return
    with contextlib.closing(Live(also_tokens=not sys.stdout.isatty())) as live:
        yield live


class Live(Watcher):
    """Draws one line at the cursor and takes it away again.

    Parameters
    ----------
    also_tokens : bool
        Go on while tokens are generated.
    """

    def __init__(self, also_tokens: bool) -> None:
        # llama_cpp points standard error elsewhere while it loads.
        self._out = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding)
        self._also_tokens = also_tokens
        self._loaded = 0.0
        self._n_made = 0
        self._bar: tqdm | None = None
        self._phase_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawing = threading.RLock()  # a handler may log itself
        self._logger = logging.getLogger("rotary_llamacpp")
        self._handle = self._logger.handle
        self._logger.handle = self._make_way  # type: ignore[method-assign]
        self._start("loading", lambda seconds: (self._loaded, []))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop()
        del self._logger.handle  # the class has it again
        self._out.close()

    # ---- phases

    def loading(self, fraction: float) -> None:
        self._loaded = fraction

    def prompt(self, llama: Llama, n_tokens: int) -> None:
        figures = Figures(llama)
        n_lookups = figures.stats["n_layers"] * n_ubatches(llama, n_tokens)

        def progress(seconds: float) -> _Progress:
            parts = figures.poll()
            if figures.stats["path"] != "slots":  # counted, but not computed yet
                return None, parts
            done = min(1.0, figures.stats["lookups"] / n_lookups)
            return done, [f"{done * n_tokens / seconds:.1f} tok/s", *parts]

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
                return self._n_made / n_predict, [speed, *self._figures.poll()]

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
        start = time.time()
        while not self._phase_over.wait(_INTERVAL_SECONDS):  # a shorter phase shows nothing
            done, parts = progress(time.time() - start)  # may log, so not under the lock
            with self._drawing:
                if self._bar is None:
                    form = (
                        "{desc}: {elapsed}{postfix}"
                        if done is None
                        else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
                    )
                    self._bar = tqdm(
                        desc=name, total=1, bar_format=form, file=self._out, leave=False, dynamic_ncols=True
                    )
                    self._bar.start_t = start
                self._bar.n = done or 0
                self._bar.set_postfix_str(", ".join(parts))
        with self._drawing:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _make_way(self, record: logging.LogRecord) -> None:
        """Our logger's `handle` meanwhile: a line begins on a clear one, and nothing is drawn over it."""
        with self._drawing:
            if self._bar is not None:
                self._bar.clear()
            self._handle(record)


class Figures:
    """Hit rate and, of the direct store, speed of the disk since the last poll."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.stats: dict[str, Any] = llama.rotary_stats()
        self._time = time.monotonic()

    def poll(self) -> list[str]:
        """``["hits 81.2 %", "disk 812 MiB/s"]``, without what does not apply."""
        last, self.stats = self.stats, self._llama.rotary_stats()
        since, self._time = self._time, time.monotonic()
        parts = []
        if self.stats["hit_rate"] is not None:
            parts.append(f"hits {100 * self.stats['hit_rate']:.1f} %")
        if self.stats["store"] == "direct":
            n_bytes = self.stats["bytes_read"] - last["bytes_read"]
            parts.append(f"disk {n_bytes / MIB / (self._time - since):.0f} MiB/s")
        return parts


def n_ubatches(llama: Llama, n_tokens: int) -> int:
    """Number of graphs that llama.cpp makes of a prompt; each looks every paged layer up once."""
    n_ubatch = llama.context_params.n_ubatch
    n_full, n_left = divmod(n_tokens, llama.n_batch)
    return n_full * -(-llama.n_batch // n_ubatch) + -(-n_left // n_ubatch)
