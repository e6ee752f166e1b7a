# SPDX-License-Identifier: MIT
"""Least frequently used by router weights.

An expert that was barely chosen is less likely to be wanted again.
"""

from __future__ import annotations

from math import sqrt

from .policy import LowestValue, Routing, Weights


class Weighted(LowestValue):
    """Evicts the least frequently used expert; a use counts by the square root of its router weight."""

    clock = 1.0
    max_clock = 1e100

    def note(self, ids: Routing, weights: Weights) -> None:
        for t, row in enumerate(ids):
            self.clock /= 0.95
            for k, expert in enumerate(row):
                self.value[expert] += self.clock if weights is None else self.clock * sqrt(weights[t][k])
        if self.clock > self.max_clock:
            self.value = [each / self.max_clock for each in self.value]
            self.clock /= self.max_clock
