# SPDX-License-Identifier: MIT
"""What something costs, in figures that are the same on every machine, however fast and however busy."""

from __future__ import annotations

import sys
from typing import Any


class Calls:
    """Counts the calls of functions, Python's and C's, that this thread makes in the ``with`` block."""

    def __init__(self) -> None:
        self.n = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, _: object, event: str, __: Any) -> None:
        self.n += event in ("call", "c_call")


def peak_kib() -> int:
    """Most memory this process had; getrusage() would begin with that of the one it was forked from."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
