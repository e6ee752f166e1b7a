# SPDX-License-Identifier: MIT
"""Predicts by tables of pairs of experts that a layer and an earlier layer chose for the same token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..policies import Routing
from ..traces.profiles import Profile
from .predictor import PrefetchPolicy, best


class Transition(PrefetchPolicy):
    """Predicts what later layers chose together with this layer's experts, from tables learnt on the way."""

    max_distance = 2

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.pairs = np.zeros((self.max_distance, n_layers, n_expert, n_expert), np.float32)
        self.alone = np.zeros((n_layers, n_expert), np.float32)
        self.now: dict[int, Routing] = {}
        self.noted = -1

    def note(self, layer: int, ids: Routing) -> None:
        if layer <= self.noted:
            self.now = {}
        self.noted = layer
        self.now[layer] = ids
        for row in ids:
            self.alone[layer, row] += 1
        for distance in range(1, self.max_distance + 1):
            for before, row in zip(reversed(self.now.get(layer - distance, ())), reversed(ids), strict=False):
                self.pairs[distance - 1, layer][np.ix_(before, row)] += 1

    def learn(self, profile: Profile) -> None:
        uses = profile.popularity.astype(float) * profile.n_tokens
        self.alone += uses.astype(np.float32)
        self.pairs[0, 1:] += (profile.pairs.astype(float) * uses[:-1, :, None]).astype(np.float32)

    def score(self, layer: int, ahead: int) -> NDArray[np.float64]:
        """Score each expert of layer `ahead` by how often it was chosen with those of `layer` now."""
        score = np.zeros(self.n_expert)
        if layer in self.now and 1 <= ahead - layer <= self.max_distance:
            for expert in self.now[layer][-1]:
                uses = float(self.alone[layer, expert]) + 1
                score += self.pairs[ahead - layer - 1, ahead, expert].astype(float) / uses
        return score

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return best(self.score(layer, ahead), n)
