# SPDX-License-Identifier: MIT
"""What tests of several rooms share: paged runs, processes, interposed C libraries, terminals, costs.

Imports nothing of this package here, as processes that must be stock's import it too.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

# Seconds. What takes so long hangs, on however slow and busy a machine; no test fails for less.
HANG_S = 1800


def heed_hang_ups() -> None:
    """For a process that begins: under nohup it would have inherited that SIGHUP is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """A failure of what would take for ever."""

    def late(*_: object) -> None:
        raise AssertionError(f"took over {HANG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write_all(writer: Any) -> None:
    """What a gguf.GGUFWriter has, to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shards(first: Path) -> list[Path]:
    """The files of a split model."""
    return sorted(first.parent.glob(first.name.replace("-00001-", "-*-")))
