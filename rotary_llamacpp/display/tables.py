# SPDX-License-Identifier: MIT
"""Renders tables as plain text, as wide as they need to be, whatever the terminal's width."""

from __future__ import annotations

import io
from collections.abc import Container, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..units import decimal, percent, ratio

_MAX_WIDTH = 1000


def columns(rows: Sequence[Sequence[str]], left: Container[str] = ()) -> list[str]:
    """Align rows, the first with the heads; columns whose head is in `left` are aligned to the left."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for head in rows[0]:
        table.add_column(justify="left" if head in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=_MAX_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Render what `rotary_llamacpp.simulation.comparison.compare` returns as lines of a table."""
    timed = any(row.get("tokens_per_second") for row in rows)
    heads = ["budget", "slots", "policy", "prefetch", "hit rate"]
    heads += ["of bytes", "tok/s", "stall ms", "accuracy", "in time"] if timed else []
    cells = [heads]
    for row in rows:
        line = [
            f"{100 * row['budget']:g} %", str(row["n_slots"]), row["policy"], row["predictor"],
            percent(row["hit_rate"]),
        ]  # fmt: skip
        if timed and row["policy"] != "belady":
            used, late = row["prefetch_used"], row["late_hits"]
            line += [
                percent(row["byte_hit_rate"]), decimal(row["tokens_per_second"]),
                f"{row['stall_us'] / 1000:.2f}", percent(ratio(used, row["prefetched"])),
                percent(ratio(used - late, used)),
            ]  # fmt: skip
        cells.append(line + [""] * (len(heads) - len(line)))
    return columns(cells)
