# SPDX-License-Identifier: MIT
"""Recall, this project's own policy: after similar tokens, routing goes on in similar ways.

The last token's routing, in all layers where it is known, is compared with those of a window of tokens before
it; experts that followed similar tokens are kept. Similarity is the number of experts that two tokens share,
summed over layers for each distance in tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from .policy import EvictionPolicy, Routing, Weights


class Recall(EvictionPolicy):
    """Keeps experts that followed the tokens routed most like the last one; without any, works as `Lfu`."""

    window = 192

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.tokens: deque[list[int]] = deque(maxlen=self.window + 1)
        self.frequency = [0.0] * n_expert
        self.score: list[float] | None = None
        self.part = [0] * self.window
        self.sums: list[int] = shared.setdefault("sums", [0] * self.window)

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            self.tokens.append(list(row))
            self.frequency = [each * 0.95 for each in self.frequency]
            for expert in row:
                self.frequency[expert] += 1 - 0.95
        last = set(self.tokens[-1])
        for distance, token in enumerate(list(self.tokens)[-2::-1]):
            n_shared = sum(expert in last for expert in token)
            self.sums[distance] += n_shared - self.part[distance]
            self.part[distance] = n_shared
        self.score = None

    def choose(self, candidates: Sequence[int]) -> int:
        if self.score is None:
            self.score = self._scores()
        return min(candidates, key=self.score.__getitem__)

    def _scores(self) -> list[float]:
        n, every = len(self.tokens), float(len(self.tokens[-1])) if self.tokens else 1.0
        score, total, wave = [0.0] * self.n_expert, 1e-9, 0.0
        for i, token in enumerate(self.tokens):
            for expert in token:
                score[expert] += wave
            alike = self.sums[n - 2 - i] / every if i + 1 < n else 0.0
            weight = alike * alike * alike * alike
            wave = wave * 0.8 + weight
            total += weight
        return [recalled / total + known for recalled, known in zip(score, self.frequency, strict=True)]
