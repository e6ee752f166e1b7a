# SPDX-License-Identifier: MIT
"""Eviction policies: the native ones by name, and the same in Python, to read and to write one's own after.

A policy belongs to one layer. It sees every routing, what enters and what leaves, and says who leaves when a
slot is wanted. `NATIVE` names those of the library (native/src/cache/policies, which name the papers); a
class here of the same behaviour, request by request, is in `REFERENCES`. Anything with the methods of
`EvictionPolicy` can be given as ``policy=`` instead of a name: it runs in Python, called from the thread that
computes, and slower for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

NATIVE = ("lru", "lfu", "weighted", "sieve", "s3fifo", "arc", "recall")
AUTO = "auto"  # the best that can run where lookups are resolved: recall on the host, lfu on a device

Routing = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]] | None


class EvictionPolicy:
    """Base of policies written in Python: one object for each layer.

    Parameters
    ----------
    layer : int
        The model's layer number.
    n_expert, n_slots : int
        Of that layer.
    shared : dict
        The same dict for all layers of one model.
    """

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        self.layer, self.n_expert, self.n_slots, self.shared = layer, n_expert, n_slots, shared

    def note(self, ids: Routing, weights: Weights) -> None:
        """A routing, shape (n_tokens, n_used), before any of it enters; weights None where not known."""

    def enter(self, expert: int, wanted: bool) -> None:
        """`expert` is resident; not `wanted`: it came ahead, and the routing did not name it."""

    def leave(self, expert: int) -> None:
        """`expert` is not resident any more."""

    def resize(self, n_slots: int) -> None:
        """The layer has as many slots from now on; those who have to leave have left."""
        self.n_slots = n_slots

    def choose(self, candidates: Sequence[int]) -> int:
        """Who leaves, of these residents, in the order of their slots."""
        raise NotImplementedError


Factory = Callable[[int, int, int, dict[str, Any]], EvictionPolicy]


class _Valued(EvictionPolicy):
    """Each expert has a value; the first of the lowest leaves."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.value = [0.0] * n_expert

    def choose(self, candidates: Sequence[int]) -> int:
        return min(candidates, key=self.value.__getitem__)


class Lru(_Valued):
    """Least recently used; what came ahead for nothing leaves first."""

    clock = unused = 0

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            for expert in row:
                self.clock += 1
                self.value[expert] = self.clock

    def enter(self, expert: int, wanted: bool) -> None:
        if not wanted:
            self.unused -= 1
            self.value[expert] = self.unused


class Lfu(_Valued):
    """Least frequently used; each token takes a twentieth of what earlier uses are worth."""

    clock = 1.0
    growth = 1 / 0.95
    most = 2.0**100

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            self.clock *= self.growth
            for expert in row:
                self.value[expert] += self.clock
        if self.clock > self.most:
            self.value = [each / self.most for each in self.value]
            self.clock /= self.most


class Weighted(_Valued):
    """As `Lfu`, a use counting by the square root of its router weight."""

    clock = 1.0
    most = 1e100

    def note(self, ids: Routing, weights: Weights) -> None:
        for t, row in enumerate(ids):
            self.clock /= 0.95
            for k, expert in enumerate(row):
                self.value[expert] += self.clock if weights is None else self.clock * sqrt(weights[t][k])
        if self.clock > self.most:
            self.value = [each / self.most for each in self.value]
            self.clock /= self.most


class Sieve(EvictionPolicy):
    """A queue by arrival; a hand takes the first that was not used since it last passed."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.queue: list[int] = []
        self.marked: set[int] = set()
        self.hand = 0

    def note(self, ids: Routing, weights: Weights) -> None:
        self.marked.update(expert for row in ids for expert in row if expert in self.queue)

    def enter(self, expert: int, wanted: bool) -> None:
        self.queue.append(expert)

    def leave(self, expert: int) -> None:
        self.hand -= self.queue.index(expert) < self.hand
        self.queue.remove(expert)
        self.marked.discard(expert)

    def choose(self, candidates: Sequence[int]) -> int:
        while True:
            self.hand = self.hand if self.hand < len(self.queue) else 0
            expert = self.queue[self.hand]
            if expert in candidates:
                if expert not in self.marked:
                    return expert
                self.marked.remove(expert)
            self.hand += 1


class S3Fifo(EvictionPolicy):
    """A small queue for newcomers, a main one for those used again, a memory of who left the small one."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: deque[int] = deque(maxlen=n_slots)
        self.uses = [0] * n_expert
        self.most_small = max(1, n_slots // 10)

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            for expert in row:
                if expert in self.small or expert in self.main:
                    self.uses[expert] = min(self.uses[expert] + 1, 3)

    def enter(self, expert: int, wanted: bool) -> None:
        if expert in self.ghosts:
            self.ghosts.remove(expert)
            self.main.append(expert)
        else:
            self.small.append(expert)
        self.uses[expert] = 0

    def leave(self, expert: int) -> None:
        if expert in self.small:
            self.small.remove(expert)
            self.ghosts.append(expert)
        else:
            self.main.remove(expert)

    def resize(self, n_slots: int) -> None:
        super().resize(n_slots)
        self.ghosts = deque(self.ghosts, maxlen=n_slots)
        self.most_small = max(1, n_slots // 10)

    def choose(self, candidates: Sequence[int]) -> int:
        i = 0
        while len(self.small) >= self.most_small and i < len(self.small):
            expert = self.small[i]
            if expert not in candidates:
                i += 1
            elif self.uses[expert] <= 1:
                return expert
            else:
                self.main.append(self.small.pop(i))
                self.uses[expert] = 0
        i = 0
        while any(expert in candidates for expert in self.main):
            i = i if i < len(self.main) else 0
            expert = self.main[i]
            if expert not in candidates:
                i += 1
            elif self.uses[expert] == 0:
                return expert
            else:
                self.uses[expert] -= 1
                self.main.append(self.main.pop(i))
        return next(expert for expert in self.small if expert in candidates)


class Arc(EvictionPolicy):
    """Used once and used again, each least recently used first, in shares that follow who is missed."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.once: list[int] = []
        self.again: list[int] = []
        self.once_gone: deque[int] = deque(maxlen=n_slots)
        self.again_gone: deque[int] = deque(maxlen=n_slots)
        self.share = 0.0

    def note(self, ids: Routing, weights: Weights) -> None:
        for row in ids:
            for expert in row:
                for kind in (self.once, self.again):
                    if expert in kind:
                        kind.remove(expert)
                        self.again.append(expert)
                        break

    def enter(self, expert: int, wanted: bool) -> None:
        once, again = len(self.once_gone), len(self.again_gone)
        if expert in self.once_gone:
            self.share = min(self.share + max(again / once, 1.0), float(self.n_slots))
            self.once_gone.remove(expert)
            self.again.append(expert)
        elif expert in self.again_gone:
            self.share = max(self.share - max(once / again, 1.0), 0.0)
            self.again_gone.remove(expert)
            self.again.append(expert)
        else:
            self.once.append(expert)

    def leave(self, expert: int) -> None:
        if expert in self.once:
            self.once.remove(expert)
            self.once_gone.append(expert)
        else:
            self.again.remove(expert)
            self.again_gone.append(expert)

    def resize(self, n_slots: int) -> None:
        super().resize(n_slots)
        self.share = min(self.share, float(n_slots))
        self.once_gone = deque(self.once_gone, maxlen=n_slots)
        self.again_gone = deque(self.again_gone, maxlen=n_slots)

    def choose(self, candidates: Sequence[int]) -> int:
        kinds = (
            (self.once, self.again) if self.once and len(self.once) > self.share else (self.again, self.once)
        )
        return next(expert for kind in kinds for expert in kind if expert in candidates)


class Recall(EvictionPolicy):
    """What followed the tokens that were routed most like the last one, in all layers; else `Lfu`."""

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
        return [said / total + known for said, known in zip(score, self.frequency, strict=True)]


REFERENCES: dict[str, Factory] = {
    "lru": Lru, "lfu": Lfu, "weighted": Weighted, "sieve": Sieve, "s3fifo": S3Fifo, "arc": Arc,
    "recall": Recall,
}  # fmt: skip
