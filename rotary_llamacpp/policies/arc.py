# SPDX-License-Identifier: MIT
"""ARC, which balances recency and frequency.

N. Megiddo and D. Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from .policy import EvictionPolicy, Routing, Weights


class Arc(EvictionPolicy):
    """Divides slots between experts used once and experts used again, by which are missed after eviction."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.once: list[int] = []
        self.again: list[int] = []
        self.once_ghosts: deque[int] = deque(maxlen=n_slots)
        self.again_ghosts: deque[int] = deque(maxlen=n_slots)
        self.share = 0.0

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            for expert in row:
                for kind in (self.once, self.again):
                    if expert in kind:
                        kind.remove(expert)
                        self.again.append(expert)
                        break

    def enter(self, expert: int, wanted: bool) -> None:
        once, again = len(self.once_ghosts), len(self.again_ghosts)
        if expert in self.once_ghosts:
            self.share = min(self.share + max(again / once, 1.0), float(self.n_slots))
            self.once_ghosts.remove(expert)
            self.again.append(expert)
        elif expert in self.again_ghosts:
            self.share = max(self.share - max(once / again, 1.0), 0.0)
            self.again_ghosts.remove(expert)
            self.again.append(expert)
        else:
            self.once.append(expert)

    def leave(self, expert: int) -> None:
        if expert in self.once:
            self.once.remove(expert)
            self.once_ghosts.append(expert)
        else:
            self.again.remove(expert)
            self.again_ghosts.append(expert)

    def resize(self, n_slots: int) -> None:
        super().resize(n_slots)
        self.share = min(self.share, float(n_slots))
        self.once_ghosts = deque(self.once_ghosts, maxlen=n_slots)
        self.again_ghosts = deque(self.again_ghosts, maxlen=n_slots)

    def choose(self, candidates: Sequence[int]) -> int:
        kinds = (
            (self.once, self.again) if self.once and len(self.once) > self.share else (self.again, self.once)
        )
        return next(expert for kind in kinds for expert in kind if expert in candidates)
