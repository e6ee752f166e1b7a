# SPDX-License-Identifier: MIT
"""Shared by tests in several folders: paged runs, processes, preloaded C libraries, terminals, costs.

This module does not import rotary_llamacpp, since processes that run stock alone import it too.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

# Seconds after which a test counts as hanging, even on a slow and busy machine; no test fails earlier.
HANG_S = 1800


def heed_hang_ups() -> None:
    """Restore SIGHUP's default action in a new process, which under nohup inherits that it is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Fail a block that takes longer than HANG_S."""

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
    """Write everything that a gguf.GGUFWriter was given to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shards(first: Path) -> list[Path]:
    """The files of a split model."""
    return sorted(first.parent.glob(first.name.replace("-00001-", "-*-")))
