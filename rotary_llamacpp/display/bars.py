# SPDX-License-Identifier: MIT
"""Progress bars of bytes on standard error, with rate and time left. Does not load llama.cpp."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class _Terminal:
    """Standard error that drops what cannot be written, because the terminal may be gone."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def bars(
    off: bool = False,
) -> Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], object]]]:
    """Return a maker of progress bars, which show nothing if `off` or if standard error is not a terminal."""

    @contextlib.contextmanager
    def bar(what: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=_Terminal()),  # type: ignore[arg-type]
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=off or not sys.stderr.isatty(),
        ) as progress:
            task = progress.add_task(what, total=n_bytes)
            yield lambda done: progress.advance(task, done)

    return bar
