# SPDX-License-Identifier: MIT
"""Base of eviction policies in Python. One object belongs to one layer; the thread that computes calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Routing = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]] | None


class EvictionPolicy:
    """Base of eviction policies written in Python: one object for each layer.

    Parameters
    ----------
    layer : int
        The model's layer number.
    n_expert, n_slots : int
        How many experts and slots the layer has.
    shared : dict
        One dict that all layers of a model get.
    """

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        self.layer, self.n_expert, self.n_slots, self.shared = layer, n_expert, n_slots, shared

    def note(self, ids: Routing, weights: Weights) -> None:
        """See a routing of shape (n_tokens, n_used) before its experts enter; weights are None if unknown."""

    def enter(self, expert: int, wanted: bool) -> None:
        """Take note that `expert` is resident now; without `wanted` it was prefetched and not routed to."""

    def leave(self, expert: int) -> None:
        """Take note that `expert` is no longer resident."""

    def resize(self, n_slots: int) -> None:
        """Accept a new number of slots; experts that have to make room have left already."""
        self.n_slots = n_slots

    def choose(self, candidates: Sequence[int]) -> int:
        """Pick the victim among these resident experts, which are in the order of their slots."""
        raise NotImplementedError


Factory = Callable[[int, int, int, dict[str, Any]], EvictionPolicy]


class LowestValue(EvictionPolicy):
    """Gives each expert a value and evicts the first expert with the lowest."""

    def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
        super().__init__(layer, n_expert, n_slots, shared)
        self.value = [0.0] * n_expert

    def choose(self, candidates: Sequence[int]) -> int:
        return min(candidates, key=self.value.__getitem__)
