# SPDX-License-Identifier: MIT
"""Expected hit rates: from a trace, a profile, or a default curve.

The default curve is what ``rotary simulate --policies recall`` gives for recorded routings of Qwen3-30B-A3B
and Gemma-4-26B-A4B (6 of 128 experts, 128 tokens decoded, warm from the prompt), the mean of both. It is read
twice, by slots / experts and by slots / experts used, and the lower rate counts: the first overestimates with
few experts, the second with many. Routing without any locality, slots / experts, is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RotaryError
from ..gguf_files.info import LayerInfo
from ..traces.archive import Trace
from ..traces.profiles import Profile

# (share of 128 experts, hit rate), 6 used: 6, 10, 16, 24, 32, 48, 64, 96 slots.
_CURVE = (
    (0.0, 0.0), (0.047, 0.368), (0.078, 0.532), (0.125, 0.661), (0.1875, 0.765), (0.25, 0.835),
    (0.375, 0.924), (0.5, 0.960), (0.75, 0.968), (1.0, 1.0),
)  # fmt: skip
_SHARES = [share for share, _ in _CURVE]
_RATES = [rate for _, rate in _CURVE]
_MULTIPLES = [share * 128 / 6 for share in _SHARES]


@dataclass(frozen=True)
class Hits:
    """An expected hit rate.

    Attributes
    ----------
    of : callable
        Byte hit rate of decode, 0 to 1, given the slots of each layer.
    source : str
        Source of the expectation, in words.
    """

    of: Callable[[Sequence[int]], float]
    source: str


def curve(n_slots: int, n_expert: int, n_used: int) -> float:
    """Expected hit rate of one layer by the default curve."""
    if n_slots >= n_expert:
        return 1.0
    by_share = float(np.interp(n_slots / n_expert, _SHARES, _RATES))
    by_multiple = float(np.interp(n_slots / n_used, _MULTIPLES, _RATES))
    return max(n_slots / n_expert, min(by_share, by_multiple))


def default(layers: Sequence[LayerInfo]) -> Hits:
    """Expect hit rates of the default curve."""

    def of(n_slots: Sequence[int]) -> float:
        return _of_layers(layers, n_slots, curve)

    return Hits(of, "default curve (recorded Qwen3-30B-A3B and Gemma-4-26B-A4B, policy recall)")


def uniform(layers: Sequence[LayerInfo], n_slots: Sequence[int]) -> float:
    """Hit rate that routing without any locality would have."""
    return _of_layers(layers, n_slots, lambda slots, n_expert, _: min(1.0, slots / n_expert))


def of_profile(profile: Profile, layers: Sequence[LayerInfo], path: str) -> Hits:
    """Expect the most popular experts to stay in slots, or the default curve where that is higher.

    A profile has popularity but no order in time, which policies exploit too.

    Raises
    ------
    RotaryError
        The profile is of another model.
    """
    if profile.layers != [layer.il for layer in layers] or any(
        layer.n_expert != profile.n_expert for layer in layers
    ):
        raise RotaryError(
            f"{path}: {len(profile.layers)} layers of {profile.n_expert} experts, the model has "
            f"{len(layers)} layers; make a profile of this model, or give --profile off"
        )
    ranked = -np.sort(-profile.popularity.astype(float), axis=1)
    found = np.cumsum(ranked, axis=1) / np.maximum(ranked.sum(axis=1, keepdims=True), 1e-12)
    rows = {layer.il: row for layer, row in zip(layers, found, strict=True)}
    ordinary = default(layers)

    def of(n_slots: Sequence[int]) -> float:
        static = sum(
            layer.chosen_bytes * float(rows[layer.il][slots - 1])
            for layer, slots in zip(layers, n_slots, strict=True)
        )
        return max(static / _chosen(layers), ordinary.of(n_slots))

    return Hits(
        of, f"{path} with the most popular experts resident, or the default curve where that is higher"
    )


def of_trace(trace: Trace, layers: Sequence[LayerInfo], path: str) -> Hits:
    """Expect the hit rates of replaying a trace with the policy ``recall`` on the library's slot tables.

    Raises
    ------
    RotaryError
        The trace is of another model or has no decoded tokens, or the native library is missing.
    """
    from ..simulation.replays import replay
    from ..traces.archive import DECODE

    if trace.layers != [layer.il for layer in layers] or trace.n_expert != max(
        (layer.n_expert for layer in layers), default=0
    ):
        raise RotaryError(
            f"{path}: {len(trace.layers)} layers of {trace.n_expert} experts, the model has {len(layers)} "
            "layers; record a trace of this model with rotary trace"
        )
    if trace.tokens(DECODE) == 0:
        raise RotaryError(f"{path}: has no decoded tokens; record a trace with -n above 0")

    def of(n_slots: Sequence[int]) -> float:
        if all(slots >= layer.n_expert for layer, slots in zip(layers, n_slots, strict=True)):
            return 1.0  # resident from the start, so not even a first use misses
        return replay(trace, "recall", list(n_slots)).byte_hit_rate or 0.0

    return Hits(of, f"{path}, replayed with policy recall")


def _of_layers(
    layers: Sequence[LayerInfo], n_slots: Sequence[int], rate: Callable[[int, int, int], float]
) -> float:
    found = sum(
        layer.chosen_bytes * rate(slots, layer.n_expert, layer.n_expert_used)
        for layer, slots in zip(layers, n_slots, strict=True)
    )
    return found / _chosen(layers)


def _chosen(layers: Sequence[LayerInfo]) -> int:
    return max(sum(layer.chosen_bytes for layer in layers), 1)
