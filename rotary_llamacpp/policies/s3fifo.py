# SPDX-License-Identifier: MIT
"""S3-FIFO, which filters newcomers with a small queue.

J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from .policy import EvictionPolicy, Routing, Weights


class S3Fifo(EvictionPolicy):
    """Keeps a small queue of newcomers, a main queue of experts used again, and ghosts of the small queue."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: deque[int] = deque(maxlen=n_slots)
        self.uses = [0] * n_expert
        self.max_small = max(1, n_slots // 10)

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            for expert in row:
                if expert in self.small or expert in self.main:
                    self.uses[expert] = min(self.uses[expert] + 1, 3)

    def enter(self, expert: int, wanted: bool) -> None:
        if expert in self.ghosts:
            self.ghosts.remove(expert)
            self.main.append(expert)
        else:
            self.small.append(expert)
        self.uses[expert] = 0

    def leave(self, expert: int) -> None:
        if expert in self.small:
            self.small.remove(expert)
            self.ghosts.append(expert)
        else:
            self.main.remove(expert)

    def resize(self, n_slots: int) -> None:
        super().resize(n_slots)
        self.ghosts = deque(self.ghosts, maxlen=n_slots)
        self.max_small = max(1, n_slots // 10)

    def choose(self, candidates: Sequence[int]) -> int:
        i = 0
        while len(self.small) >= self.max_small and i < len(self.small):
            expert = self.small[i]
            if expert not in candidates:
                i += 1
            elif self.uses[expert] <= 1:
                return expert
            else:
                self.main.append(self.small.pop(i))
                self.uses[expert] = 0
        i = 0
        while any(expert in candidates for expert in self.main):
            i = i if i < len(self.main) else 0
            expert = self.main[i]
            if expert not in candidates:
                i += 1
            elif self.uses[expert] == 0:
                return expert
            else:
                self.uses[expert] -= 1
                self.main.append(self.main.pop(i))
        return next(expert for expert in self.small if expert in candidates)
