# SPDX-License-Identifier: MIT
"""Predictors of the next layers' experts from routing alone, for the simulator.

What the library itself applies, the next layer's router, needs hidden states, which a trace has not: `Router`
stands for it with a given share of right guesses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .profiles import Profile
from .traces import Trace


class Predictor:
    """Sees each routing when it is made, in order; names what a layer ahead will want, likeliest first.

    Layers are numbered from 0 among those of the trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.n_layers, self.n_expert = len(trace.layers), trace.n_expert
        self.n_used = trace.experts.shape[1]

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        """`layer` has chosen `experts`; `first`: of a new token."""

    def learn(self, profile: Profile) -> None:
        """Begin with what a profile of the model says, where that is of use."""

    def name(self, layer: int, ahead: int) -> list[int]:
        """After `layer`, what `ahead` will want."""
        raise NotImplementedError

    def best(self, score: NDArray[np.float64]) -> list[int]:
        """The experts of the highest scores above 0, as many as are used."""
        order = np.argsort(-score, kind="stable")[: self.n_used]
        return [int(expert) for expert in order if score[expert] > 0]


class Previous(Predictor):
    """What the layer chose for the token before."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.last: list[list[int]] = [[] for _ in range(self.n_layers)]

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        self.last[layer] = experts

    def name(self, layer: int, ahead: int) -> list[int]:
        return self.last[ahead]


class Popular(Predictor):
    """What the layer chose most often, a token taking a twentieth of what was before."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.count = np.zeros((self.n_layers, self.n_expert))

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        self.count[layer] *= 0.95
        self.count[layer, experts] += 1

    def name(self, layer: int, ahead: int) -> list[int]:
        return self.best(self.count[ahead])


class Transition(Predictor):
    """What layers ahead chose when this one chose as it does now: a table of pairs, learnt as it goes."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.n_ahead = 2
        shape = (self.n_ahead, self.n_layers, self.n_expert, self.n_expert)
        self.pairs = np.zeros(shape, np.float32)
        self.alone = np.zeros((self.n_layers, self.n_expert), np.float32)
        self.token: dict[int, list[int]] = {}

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        if first:
            self.token = {}
        self.token[layer] = experts
        self.alone[layer, experts] += 1
        for distance in range(self.n_ahead):
            before = self.token.get(layer - 1 - distance)
            if before is not None:
                self.pairs[distance, layer][np.ix_(before, experts)] += 1

    def learn(self, profile: Profile) -> None:
        self.alone += profile.popularity * profile.n_tokens
        self.pairs[0, 1:] += profile.pairs * (profile.popularity[:-1, :, None] * profile.n_tokens)

    def score(self, layer: int, ahead: int) -> NDArray[np.float64]:
        """How often each expert of `ahead` came with those that `layer` has chosen now."""
        now = self.token.get(layer, [])
        pairs = self.pairs[ahead - layer - 1, ahead][now]
        return (pairs / (self.alone[layer, now][:, None] + 1)).sum(axis=0).astype(float)

    def name(self, layer: int, ahead: int) -> list[int]:
        return self.best(self.score(layer, ahead)) if ahead - layer <= self.n_ahead else []


class Recall(Predictor):
    """What the tokens routed most like this one, in the layers so far, chose there."""

    window = 192

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.tokens: list[dict[int, list[int]]] = []
        self.shared: NDArray[np.float64] = np.zeros(0)

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        if first or not self.tokens:
            self.tokens = [*self.tokens[-self.window :], {}]
            self.shared = np.zeros(len(self.tokens) - 1)
        self.tokens[-1][layer] = experts
        chosen = set(experts)
        for i, token in enumerate(self.tokens[:-1]):
            self.shared[i] += len(chosen.intersection(token.get(layer, ())))

    def score(self, layer: int, ahead: int) -> NDArray[np.float64]:
        """Each expert by the fourth power of the likeness of the tokens that chose it."""
        score = np.zeros(self.n_expert)
        weights = (self.shared / (self.n_used * len(self.tokens[-1]))) ** 4
        for weight, token in zip(weights, self.tokens[:-1], strict=True):
            score[token.get(ahead, [])] += weight
        return score / (weights.sum() + 1e-9)

    def name(self, layer: int, ahead: int) -> list[int]:
        return self.best(self.score(layer, ahead))


class Mixed(Predictor):
    """`Transition` and `Recall`, their scores added."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.transition, self.recall = Transition(trace), Recall(trace)

    def learn(self, profile: Profile) -> None:
        self.transition.learn(profile)

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        self.transition.see(layer, experts, first)
        self.recall.see(layer, experts, first)

    def name(self, layer: int, ahead: int) -> list[int]:
        if ahead - layer > self.transition.n_ahead:
            return self.recall.name(layer, ahead)
        pairs = self.transition.score(layer, ahead)
        return self.best(pairs / (pairs.sum() + 1e-9) * self.n_used + self.recall.score(layer, ahead))


class Router(Predictor):
    """Knows the trace, and names each expert rightly with a chance of 0.85, as early routers do."""

    accuracy = 0.85

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        index = {layer: i for i, layer in enumerate(trace.layers)}
        self.ahead: list[list[list[int]]] = [[] for _ in range(self.n_layers)]
        for layer, experts in zip(trace.layer, trace.experts, strict=True):
            self.ahead[index[int(layer)]].append(experts[experts >= 0].tolist())
        self.seen = [0] * self.n_layers
        self.chance = np.random.default_rng(0)

    def see(self, layer: int, experts: list[int], first: bool) -> None:
        self.seen[layer] += 1

    def name(self, layer: int, ahead: int) -> list[int]:
        coming = self.ahead[ahead]
        if self.seen[ahead] >= len(coming):
            return []
        named = [
            expert if self.chance.random() < self.accuracy else int(self.chance.integers(self.n_expert))
            for expert in coming[self.seen[ahead]]
        ]
        return list(dict.fromkeys(named))


PREDICTORS: dict[str, Callable[[Trace], Predictor]] = {
    "previous": Previous, "popular": Popular, "transition": Transition, "recall": Recall, "mixed": Mixed,
    "router": Router,
}  # fmt: skip
