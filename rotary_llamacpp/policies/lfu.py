# SPDX-License-Identifier: MIT
"""Least frequently used, with ageing.

D. Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
policies", IEEE Transactions on Computers 50, 2001.
"""

from __future__ import annotations

from .policy import LowestValue, Routing, Weights


class Lfu(LowestValue):
    """Evicts the least frequently used expert; each token lowers earlier uses by a twentieth."""

    clock = 1.0
    growth = 1 / 0.95
    max_clock = 2.0**100

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            self.clock *= self.growth
            for expert in row:
                self.value[expert] += self.clock
        if self.clock > self.max_clock:
            self.value = [each / self.max_clock for each in self.value]
            self.clock /= self.max_clock
