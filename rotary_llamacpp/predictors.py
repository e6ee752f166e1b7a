# SPDX-License-Identifier: MIT
"""Predictors of what the next layers will want: names of the native ones, and the same in Python, to read
and to write one's own after.

One that is given as ``prefetch=`` sees every routing and names what is to come ahead; how many layers ahead
it is asked, and which of its guesses are followed, the library decides by what guesses were worth, by the
disk's speed and by the time of a layer. `NAMES` are those of the library (native/src/prefetch/predictors); a
class here of the same behaviour, call by call, is in `REFERENCES`. Anything with the methods of
`PrefetchPolicy` can be given instead of a name: it runs in Python, called from the thread that computes, and
slower for it.

What the library applies by itself, the next layers' routers, needs hidden states, which routings have not:
"router" is a name that only a model can have, and in the simulator `Router` stands for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .policies import Routing
from .profiles import Profile
from .traces import Trace

ROUTER = "router"
FROM_ROUTINGS = ("previous", "popular", "transition", "similar", "mixed")
NAMES = (ROUTER, *FROM_ROUTINGS)


class PrefetchPolicy:
    """Base of predictors written in Python: one object for the layers of a device.

    Parameters
    ----------
    n_layers : int
        Layers that are paged; they are numbered from 0, in the model's order.
    n_expert, n_used : int
        The largest of these layers.
    """

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        self.n_layers, self.n_expert, self.n_used = n_layers, n_expert, n_used

    def note(self, layer: int, ids: Routing) -> None:
        """`layer` has routed so, shape (n_tokens, n_used).

        The layers of a batch come in order. One that routes fewer tokens than the layer before routes the
        last ones.
        """

    def learn(self, profile: Profile) -> None:
        """Begin with what a profile of the model says, where that is of use."""

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        """After the routing of `layer`: up to n that `ahead` will want for the last token, best first."""
        raise NotImplementedError


Factory = Callable[[int, int, int], PrefetchPolicy]


def best(score: NDArray[np.float64], n: int) -> list[int]:
    """The experts of the n highest scores, those above 0."""
    order = np.argsort(-score, kind="stable")[:n]
    return [int(expert) for expert in order if score[expert] > 0]


class Previous(PrefetchPolicy):
    """What the layer chose for the token before."""

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.last: list[list[int]] = [[] for _ in range(n_layers)]

    def note(self, layer: int, ids: Routing) -> None:
        self.last[layer] = list(ids[-1])

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return self.last[ahead][:n]


class Popular(PrefetchPolicy):
    """What the layer chose most often, a token taking a twentieth of what was before."""

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


class Transition(PrefetchPolicy):
    """What layers ahead chose when this one chose as it does now: tables of pairs, learnt as it goes."""

    n_ahead = 2

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.pairs = np.zeros((self.n_ahead, n_layers, n_expert, n_expert), np.float32)
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
        for distance in range(1, self.n_ahead + 1):
            for before, row in zip(reversed(self.now.get(layer - distance, ())), reversed(ids), strict=False):
                self.pairs[distance - 1, layer][np.ix_(before, row)] += 1

    def learn(self, profile: Profile) -> None:
        uses = profile.popularity.astype(float) * profile.n_tokens
        self.alone += uses.astype(np.float32)
        self.pairs[0, 1:] += (profile.pairs.astype(float) * uses[:-1, :, None]).astype(np.float32)

    def score(self, layer: int, ahead: int) -> NDArray[np.float64]:
        """How often each expert of `ahead` came with those that `layer` has chosen now."""
        score = np.zeros(self.n_expert)
        if layer in self.now and 1 <= ahead - layer <= self.n_ahead:
            for expert in self.now[layer][-1]:
                uses = float(self.alone[layer, expert]) + 1
                score += self.pairs[ahead - layer - 1, ahead, expert].astype(float) / uses
        return score

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return best(self.score(layer, ahead), n)


class Similar(PrefetchPolicy):
    """What the tokens routed most like this one, in the layers so far, chose there."""

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
        """Each expert by the fourth power of the likeness of the tokens that chose it."""
        score, total = np.zeros(self.n_expert), 0.0
        for shared, token in zip(self.shared, self.tokens, strict=False):  # without the last one
            alike = shared / self.n_chosen
            weight = alike * alike * alike * alike
            score[token.get(ahead, [])] += weight
            total += weight
        return score / (total + 1e-9)

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return best(self.score(layer, ahead), n)


class Mixed(PrefetchPolicy):
    """`Transition` and `Similar`, their scores added."""

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


REFERENCES: dict[str, Factory] = {
    "previous": Previous, "popular": Popular, "transition": Transition, "similar": Similar, "mixed": Mixed,
}  # fmt: skip


class Router(PrefetchPolicy):
    """Knows the trace, and names each expert rightly with a chance of 0.85, as early routers do."""

    accuracy = 0.85

    def __init__(self, trace: Trace) -> None:
        super().__init__(len(trace.layers), trace.n_expert, trace.experts.shape[1])
        index = {layer: i for i, layer in enumerate(trace.layers)}
        self.ahead: list[list[list[int]]] = [[] for _ in range(self.n_layers)]
        for layer, experts in zip(trace.layer, trace.experts, strict=True):
            self.ahead[index[int(layer)]].append(experts[experts >= 0].tolist())
        self.seen = [0] * self.n_layers
        self.chance = np.random.default_rng(0)

    def note(self, layer: int, ids: Routing) -> None:
        self.seen[layer] += len(ids)

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        coming = self.ahead[ahead]
        if self.seen[ahead] >= len(coming):
            return []
        named = [
            expert if self.chance.random() < self.accuracy else int(self.chance.integers(self.n_expert))
            for expert in coming[self.seen[ahead]]
        ]
        return list(dict.fromkeys(named))[:n]
