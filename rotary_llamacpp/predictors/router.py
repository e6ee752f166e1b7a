# SPDX-License-Identifier: MIT
"""Stands in for routers that are applied early, because a trace has no hidden states."""

from __future__ import annotations

import numpy as np

from ..policies import Routing
from ..traces import Trace
from .predictor import PrefetchPolicy


class Router(PrefetchPolicy):
    """Reads the trace ahead, and names each expert correctly with probability 0.85, as early routers do."""

    accuracy = 0.85

    def __init__(self, trace: Trace) -> None:
        super().__init__(len(trace.layers), trace.n_expert, trace.experts.shape[1])
        index = {layer: i for i, layer in enumerate(trace.layers)}
        self.future: list[list[list[int]]] = [[] for _ in range(self.n_layers)]
        for layer, experts in zip(trace.layer, trace.experts, strict=True):
            self.future[index[int(layer)]].append(experts[experts >= 0].tolist())
        self.seen = [0] * self.n_layers
        self.random = np.random.default_rng(0)

    def note(self, layer: int, ids: Routing) -> None:
        self.seen[layer] += len(ids)

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        future = self.future[ahead]
        if self.seen[ahead] >= len(future):
            return []
        named = [
            expert if self.random.random() < self.accuracy else int(self.random.integers(self.n_expert))
            for expert in future[self.seen[ahead]]
        ]
        return list(dict.fromkeys(named))[:n]
