# SPDX-License-Identifier: MIT
"""Measures of cost that do not depend on the speed or load of the machine."""

from __future__ import annotations

import sys
from typing import Any


class Calls:
    """Count the calls of Python and C functions that this thread makes in the ``with`` block."""

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
    """Peak memory of this process; getrusage() would include that of the process it was forked from."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
