# SPDX-License-Identifier: MIT
"""Least recently used. Every appearance of an expert in a routing is a use."""

from __future__ import annotations

from .policy import LowestValue, Routing, Weights


class Lru(LowestValue):
    """Evicts the least recently used expert, but before it any that were prefetched and never used."""

    clock = unused = 0

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            for expert in row:
                self.clock += 1
                self.value[expert] = self.clock

    def enter(self, expert: int, wanted: bool) -> None:
        if not wanted:
            self.unused -= 1
            self.value[expert] = self.unused
