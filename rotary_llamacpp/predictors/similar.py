# SPDX-License-Identifier: MIT
"""Predicts by similar tokens, like the eviction policy recall, but within the current token."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from ..policies import Routing
from .predictor import PrefetchPolicy, best


class Similar(PrefetchPolicy):
    """Predicts what the tokens routed most like this one in the layers so far chose."""

    window = 192

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.tokens: deque[dict[int, list[int]]] = deque(maxlen=self.window + 1)
        self.shared: list[int] = []
        self.n_chosen = 0
        self.noted = -1

    def note(self, layer: int, ids: Routing) -> None:
        if layer <= self.noted or not self.tokens:
            self.tokens.extend({} for _ in ids)
            self.shared = [0] * (len(self.tokens) - 1)
            self.n_chosen = 0
        self.noted = layer
        for token, row in zip(reversed(self.tokens), reversed(ids), strict=False):
            token[layer] = list(row)
        last = set(ids[-1])
        self.n_chosen += len(ids[-1])
        for i, shared in enumerate(self.shared):
            self.shared[i] = shared + len(last.intersection(self.tokens[i].get(layer, ())))

    def score(self, layer: int, ahead: int) -> NDArray[np.float64]:
        """Score of each expert: the similarity, to the fourth power, of the tokens that chose it."""
        score, total = np.zeros(self.n_expert), 0.0
        for shared, token in zip(self.shared, self.tokens, strict=False):  # without the last one
            similarity = shared / self.n_chosen
            weight = similarity * similarity * similarity * similarity
            score[token.get(ahead, [])] += weight
            total += weight
        return score / (total + 1e-9)

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return best(self.score(layer, ahead), n)
