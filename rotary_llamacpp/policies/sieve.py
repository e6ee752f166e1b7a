# SPDX-License-Identifier: MIT
"""SIEVE, a FIFO queue with a moving hand.

Y. Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web caches", NSDI
2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .policy import EvictionPolicy, Routing, Weights


class Sieve(EvictionPolicy):
    """Keeps a queue by arrival; a hand evicts the first expert not used since the hand last passed."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.queue: list[int] = []
        self.marked: set[int] = set()
        self.hand = 0

    def note(self, ids: Routing, weights: Weights) -> None:
        self.marked.update(expert for row in ids for expert in row if expert in self.queue)

    def enter(self, expert: int, wanted: bool) -> None:
        self.queue.append(expert)

    def leave(self, expert: int) -> None:
        self.hand -= self.queue.index(expert) < self.hand
        self.queue.remove(expert)
        self.marked.discard(expert)

    def choose(self, candidates: Sequence[int]) -> int:
        while True:
            self.hand = self.hand if self.hand < len(self.queue) else 0
            expert = self.queue[self.hand]
            if expert in candidates:
                if expert not in self.marked:
                    return expert
                self.marked.remove(expert)
            self.hand += 1
