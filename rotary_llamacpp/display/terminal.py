# SPDX-License-Identifier: MIT
"""The terminal that the live line and the panel are drawn on: console and size."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console, ConsoleDimensions


def console(out: TextIO) -> Console:
    """Make a console on a terminal; the terminal itself breaks long log lines (soft_wrap)."""
    return Console(
        file=out, force_terminal=True, force_interactive=True, soft_wrap=True, markup=False, highlight=False,
        emoji=False,
    )  # fmt: skip


def size(out: TextIO) -> ConsoleDimensions:
    """Current columns and lines of a terminal; 80 by 24 if unknown."""
    try:
        found = os.get_terminal_size(out.fileno())
    except OSError:
        return ConsoleDimensions(80, 24)
    return ConsoleDimensions(found.columns or 80, found.lines or 24)
