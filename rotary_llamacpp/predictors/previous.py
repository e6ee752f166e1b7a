# SPDX-License-Identifier: MIT
"""Predicts by the token before: the simplest predictor there is."""

from __future__ import annotations

from ..policies import Routing
from .predictor import PrefetchPolicy


class Previous(PrefetchPolicy):
    """Predicts what the layer chose for the token before."""

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.last: list[list[int]] = [[] for _ in range(n_layers)]

    def note(self, layer: int, ids: Routing) -> None:
        self.last[layer] = list(ids[-1])

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return self.last[ahead][:n]
