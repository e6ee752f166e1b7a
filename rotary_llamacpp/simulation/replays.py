# SPDX-License-Identifier: MIT
"""Replays routing traces on the library's own slot tables: hit rates, the optimum, and a model of time.

Time is modelled by events. A lookup waits for missing experts, which come over a link of fixed bandwidth;
then the layer computes. Meanwhile the link prefetches the experts that a predictor names for the next layers,
until a lookup misses. Misses go first; of a partly prefetched expert only the rest is moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..native import binding
from ..native.replay import Cache, NativePredictor
from ..policies import Factory
from ..predictors import ROUTER, PrefetchPolicy, Router
from ..predictors import Factory as PredictorFactory
from ..traces.archive import DECODE, Trace


def slots_for(trace: Trace, share: float) -> list[int]:
    """Slots of each layer for a share of all experts, at least those of one token."""
    n_used = trace.experts.shape[1]
    return [max(n_used, min(trace.n_expert, int(share * trace.n_expert + 1e-9)))] * len(trace.layers)


@dataclass(frozen=True)
class Link:
    """The link that absent experts come over, and the time of a token without any.

    Attributes
    ----------
    bytes_per_us : float
        Bandwidth of the link. 1000 is 1 GB/s.
    compute_us : float
        Computation of one token in all layers.
    latency_us : float
        Latency of each lookup with a miss.
    """

    bytes_per_us: float
    compute_us: float
    latency_us: float = 0.0


@dataclass
class Outcome:
    """Counters of a replay, of decode alone. Rates over nothing are None."""

    requests: int = 0
    misses: int = 0  # experts demanded that were absent or incomplete
    waits: int = 0  # lookups with a miss
    tokens: int = 0
    time_us: float = 0.0
    stall_us: float = 0.0
    prefetched: int = 0
    prefetch_used: int = 0  # prefetched experts that the lookup demanded
    late_hits: int = 0  # of those, experts that were still in flight
    wanted_bytes: int = 0
    demanded_bytes: int = 0  # of those, bytes that were absent
    n_bytes: int = 0  # moved over the link

    @property
    def hit_rate(self) -> float | None:
        """Share of requests whose expert was resident."""
        return 1 - self.misses / self.requests if self.requests else None

    @property
    def byte_hit_rate(self) -> float | None:
        """Share of the wanted bytes that were resident; half of an expert counts half."""
        return 1 - self.demanded_bytes / self.wanted_bytes if self.wanted_bytes else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens per second in the model of time."""
        return 1e6 * self.tokens / self.time_us if self.time_us else None


def replay(
    trace: Trace,
    policy: Factory | str,
    n_slots: Sequence[int],
    link: Link | None = None,
    predictor: PrefetchPolicy | None = None,
    depth: int = 1,
    adaptive: bool = False,
) -> Outcome:
    """Replay a trace with prefill, and count decode.

    Parameters
    ----------
    policy : str or class
        Eviction policy, as ``policy`` of `RotaryConfig`.
    n_slots : list of int
        Slots of each layer.
    link : Link, optional
        Without a link nothing takes time, and nothing is prefetched.
    predictor : PrefetchPolicy, optional
        Predicts what to prefetch; see `predictor`.
    depth : int
        Number of layers ahead for which to predict.
    adaptive : bool
        Rebalance slots between layers, as ``split="adaptive"`` of `RotaryConfig` does.
    """
    if link is None:
        return _count(trace, policy, n_slots, adaptive)
    return _Replay(trace, policy, n_slots, link, predictor, depth, adaptive).run()


def predictor(trace: Trace, kind: PredictorFactory | str) -> PrefetchPolicy:
    """Make a predictor for the model of a trace: a native one by name, or one of a class."""
    shape = (len(trace.layers), trace.n_expert, trace.experts.shape[1])
    if kind == ROUTER:
        return Router(trace)
    return NativePredictor(binding.load(), kind, *shape) if isinstance(kind, str) else kind(*shape)


def misses_of(
    trace: Trace, policy: Factory | str, n_slots: Sequence[int], adaptive: bool = False
) -> NDArray[np.int64]:
    """Number of misses in each row of a trace, shape (n,)."""
    layers = np.searchsorted(trace.layers, trace.layer).astype(np.int32)
    ids = np.ascontiguousarray(trace.experts, np.int32)
    cache = _cache(trace, policy, n_slots, adaptive)
    return np.array(cache.replay(layers, ids, _weights(trace)))


def _cache(trace: Trace, policy: Factory | str, n_slots: Sequence[int], adaptive: bool) -> Cache:
    min_slots = trace.experts.shape[1] if adaptive else None
    return Cache(binding.load(), policy, trace.n_expert, list(n_slots), min_slots)


def _count(trace: Trace, policy: Factory | str, n_slots: Sequence[int], adaptive: bool) -> Outcome:
    misses = misses_of(trace, policy, n_slots, adaptive)
    decode = trace.phase == DECODE
    size = np.array([trace.expert_bytes[int(layer)] for layer in trace.layer])
    requests = (trace.experts >= 0).sum(axis=1)
    return Outcome(
        requests=int(requests[decode].sum()), misses=int(misses[decode].sum()), tokens=trace.tokens(DECODE),
        waits=int((misses[decode] > 0).sum()),
        wanted_bytes=int((requests * size)[decode].sum()), demanded_bytes=int((misses * size)[decode].sum()),
        n_bytes=int((misses * size)[decode].sum()),
    )  # fmt: skip


def _weights(trace: Trace) -> NDArray[np.float32] | None:
    known = not np.isnan(trace.weights[trace.experts >= 0]).any()
    return np.ascontiguousarray(trace.weights, np.float32) if known else None


class _Replay:
    def __init__(
        self, trace: Trace, policy: Factory | str, n_slots: Sequence[int], link: Link,
        predictor: PrefetchPolicy | None, depth: int, adaptive: bool,
    ) -> None:  # fmt: skip
        self.trace, self.link, self.predictor, self.depth = trace, link, predictor, depth
        self.index = {layer: i for i, layer in enumerate(trace.layers)}
        self.sizes = [trace.expert_bytes[layer] for layer in trace.layers]
        self.cache = _cache(trace, policy, n_slots, adaptive)
        # Bytes that are still to come of experts in flight, by layer and expert.
        self.in_flight: dict[int, dict[int, float]] = defaultdict(dict)
        self.now = 0.0
        self.out = Outcome()

    def run(self) -> Outcome:
        trace, out = self.trace, self.out
        ids = trace.experts.astype(np.int32)
        weights = _weights(trace)
        n_used = (ids >= 0).sum(axis=1)
        for i in range(len(ids)):
            layer, n = self.index[int(trace.layer[i])], int(n_used[i])
            counted = trace.phase[i] == DECODE
            first = i == 0 or trace.step[i] != trace.step[i - 1] or trace.sequence[i] != trace.sequence[i - 1]
            before = self.now
            row = None if weights is None else np.ascontiguousarray(weights[i : i + 1, :n])
            self._look_up(layer, np.ascontiguousarray(ids[i : i + 1, :n]), row, counted)
            if self.predictor is not None:
                self.predictor.note(layer, [ids[i, :n].tolist()])
            self._compute(layer, counted)
            if counted:
                out.tokens += first
                out.time_us += self.now - before
        return out

    def _look_up(self, layer: int, ids: NDArray[Any], weights: NDArray[Any] | None, counted: bool) -> None:
        in_flight = self.in_flight.pop(layer, {})
        wanted = set(ids[0].tolist())
        for expert, left in in_flight.items():
            if expert not in wanted:
                self.cache.end_reservation(layer, expert, left <= 0)
        loads = self.cache.resolve(layer, ids, weights)
        remaining = [in_flight.get(expert, float(self.sizes[layer])) for expert, _, _ in loads]
        missing = [n_bytes for n_bytes in remaining if n_bytes > 0]
        if missing:
            stall = sum(missing) / self.link.bytes_per_us + self.link.latency_us
            self.now += stall
            self.out.stall_us += stall if counted else 0
        if counted:
            self.out.requests += ids.size
            self.out.misses += len(missing)
            self.out.waits += bool(missing)
            self.out.wanted_bytes += ids.size * self.sizes[layer]
            self.out.demanded_bytes += int(sum(missing))
            self.out.n_bytes += int(sum(missing))
            self.out.prefetched += len(in_flight)
            self.out.prefetch_used += len(wanted & in_flight.keys())
            self.out.late_hits += sum(in_flight[expert] > 0 for expert in wanted & in_flight.keys())

    def _compute(self, layer: int, counted: bool) -> None:
        gap = self.link.compute_us / len(self.sizes)
        self.now += gap
        room = gap * self.link.bytes_per_us  # bytes that the link brings meanwhile
        for later in range(layer + 1, min(layer + 1 + self.depth, len(self.sizes))):
            if self.predictor is None or room <= 0:
                break
            named = self.predictor.name(layer, later, self.predictor.n_used)
            in_flight = self.in_flight[later]
            for expert in named:
                if room <= 0:
                    break
                if expert not in in_flight:
                    if self.cache.is_resident(later, expert) or not self.cache.reserve(later, expert, named):
                        continue
                    in_flight[expert] = float(self.sizes[later])
                moved = min(room, in_flight[expert])
                in_flight[expert] -= moved
                room -= moved
                self.out.n_bytes += int(moved) if counted else 0


def belady(trace: Trace, n_slots: Sequence[int]) -> Outcome:
    """Count the fewest misses that any eviction policy could have with `n_slots` of each layer.

    The victim is the expert needed last, even if it has just been paged in. L. A. Belady, "A study of
    replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966.
    """
    out = Outcome(tokens=trace.tokens(DECODE))
    never = len(trace.step)
    for index, layer in enumerate(trace.layers):
        rows = np.flatnonzero(trace.layer == layer)
        sets = [trace.experts[row][trace.experts[row] >= 0].tolist() for row in rows]
        following: list[dict[int, int]] = []
        next_use: dict[int, int] = {}
        for t in range(len(sets) - 1, -1, -1):
            following.append({expert: next_use.get(expert, never) for expert in sets[t]})
            next_use.update(dict.fromkeys(sets[t], t))
        kept: dict[int, int] = {}  # time of the next use by expert
        for row, experts, after in zip(rows, sets, reversed(following), strict=True):
            if trace.phase[row] == DECODE:
                out.requests += len(experts)
                out.misses += sum(expert not in kept for expert in experts)
            kept.update(after)
            for expert in sorted(kept, key=kept.__getitem__)[n_slots[index] :]:
                del kept[expert]
    return out
