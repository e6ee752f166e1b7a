# SPDX-License-Identifier: MIT
"""Bars of bytes on standard error, with rate and time left. Loads nothing of llama.cpp, as live.py does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


def bars(
    off: bool = False,
) -> Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], object]]]:
    """Makes bars of bytes with rate and time left, on standard error; ones that show nothing if that is no
    terminal, or `off`.
    """

    @contextlib.contextmanager
    def bar(what: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
        hidden = off or not sys.stderr.isatty()
        with tqdm(
            total=n_bytes,
            desc=what,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            leave=False,
            disable=hidden,
        ) as made:
            yield made.update

    return bar
