# SPDX-License-Identifier: MIT
"""Predicts by popularity."""

from __future__ import annotations

import numpy as np

from ..policies import Routing
from ..traces.profiles import Profile
from .predictor import PrefetchPolicy, best


class Popular(PrefetchPolicy):
    """Predicts the experts that the layer chose most often; each token lowers old counts by a twentieth."""

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.count = np.zeros((n_layers, n_expert))

    def note(self, layer: int, ids: Routing) -> None:
        for row in ids:
            self.count[layer] *= 0.95
            self.count[layer, row] += 1

    def learn(self, profile: Profile) -> None:
        self.count += 20.0 * profile.popularity

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return best(self.count[ahead], n)
