# SPDX-License-Identifier: MIT
"""Predicts by tables of pairs and by similar tokens together."""

from __future__ import annotations

from ..policies import Routing
from ..traces.profiles import Profile
from .predictor import PrefetchPolicy, best
from .similar import Similar
from .transition import Transition


class Mixed(PrefetchPolicy):
    """Adds the scores of `Transition` and `Similar`."""

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.transition = Transition(n_layers, n_expert, n_used)
        self.similar = Similar(n_layers, n_expert, n_used)
        self.n_now = 0

    def note(self, layer: int, ids: Routing) -> None:
        self.n_now = len(ids[-1])
        self.transition.note(layer, ids)
        self.similar.note(layer, ids)

    def learn(self, profile: Profile) -> None:
        self.transition.learn(profile)

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        pairs = self.transition.score(layer, ahead)
        total = 1e-9
        for each in pairs.tolist():
            total += each
        return best(self.similar.score(layer, ahead) + pairs / total * self.n_now, n)
