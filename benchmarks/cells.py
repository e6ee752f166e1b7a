# SPDX-License-Identifier: MIT
"""The variants (of stock and Rotary) and cells (of model, disk and memory) that beyond_ram.py measures."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

LOCALITY = {"calibrated": 0.38, "random": None}  # by kind of model; 0.38 was measured on Qwen3-30B-A3B


@dataclass(frozen=True)
class Variant:
    """One way to run a model: by stock or by Rotary, with a read-ahead in KiB (None: leave it as it is)."""

    system: str  # "stock" or "rotary"
    repack: bool = True
    read_ahead: int | None = None
    prefetch: bool = True

    def name(self, repacks: bool) -> str:
        """Name for the table; `repacks` tells whether this type of weights is repacked at all."""
        parts = [] if self.read_ahead is None else [f"read-ahead {self.read_ahead}"]
        if repacks and (self.system == "stock" or not self.repack):
            parts.append("repacked" if self.repack else "plain")
        if not self.prefetch:
            parts.append("prefetch off")
        return ", ".join(parts) or "default"


@dataclass(frozen=True)
class Cell:
    """A model on a disk under a memory limit (a share of its size), or in the page cache without a limit."""

    type: str
    disk: str
    memory: float | None
    kind: str  # of model: "calibrated" or "random"
    streams: tuple[str, ...]  # of tokens: the kind's, and "repeat"
    shown: bool = True  # False: only the reference, stock in memory

    def __str__(self) -> str:
        where = "in memory" if self.memory is None else f"{self.disk} disk, {self.memory:.0%}"
        return f"{self.type}, {where}, {self.kind}"


def plan(
    types: list[str], routings: list[str], memory: list[float | None], disks: list[str], every: bool
) -> list[Cell]:
    """Cells in the order of measurement: by type; in memory first, as reference for the others; then by disk.

    Unless `every` is set, "random" and "repeat" are measured only at the first limit, and the machine's disk,
    if there are others, only with "calibrated" at the first limit. "repeat" is a second stream of the runs of
    "calibrated".
    """
    limits = [share for share in memory if share is not None]
    cells = []
    for type_ in types:
        models = {
            kind: tuple(s for s in ((kind, "repeat") if kind == "calibrated" else (kind,)) if s in routings)
            for kind in LOCALITY
        }
        models = {kind: streams for kind, streams in models.items() if streams}
        for kind, streams in models.items():
            shown = None in memory and (every or kind == next(iter(models)))
            cells.append(Cell(type_, "machine", None, kind, streams, shown))
        for disk, kind, share in itertools.product(disks, models, limits):
            streams = models[kind]
            if not every:
                main = share == limits[0]
                full = disk != "machine" or disks == ["machine"]
                if not (main or full) or (kind == "random" and not (main and full) and len(models) > 1):
                    continue
                if not (main and full) and kind in streams:
                    streams = (kind,)
            cells.append(Cell(type_, disk, share, kind, streams))
    return cells
