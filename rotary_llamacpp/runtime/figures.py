# SPDX-License-Identifier: MIT
"""Polls the counters of a running model, and computes what happened between polls. Draws nothing.

A poll only reads, so another thread than the model's may do it; a `Figures` belongs to one thread at a time.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..units import ratio
from .llama import Llama


@dataclass(frozen=True)
class Interval:
    """The time between two polls, without a reset of counters. A rate over nothing is None.

    Parameters
    ----------
    seconds : float
        Wall time.
    before, after : dict
        `Llama.rotary_stats()` at both ends.
    """

    seconds: float
    before: dict[str, Any]
    after: dict[str, Any]

    def per_second(self, counter: str) -> float | None:
        """Growth of a counter per second, in the unit of the counter."""
        return ratio(self.after[counter] - self.before[counter], self.seconds)

    def share_of_time(self, counter: str) -> float:
        """Share of the wall time that a counter of microseconds accounts for.

        Time is counted once a wait or copy ends; one that began before the interval may make this exceed 1.
        """
        return (self.per_second(counter) or 0.0) / 1e6

    @property
    def hit_rate(self) -> float | None:
        """Hit rate of the requests in the interval, 0 to 1."""
        return _hit_rate(self.before, self.after)

    @property
    def layer_hit_rates(self) -> list[float | None]:
        """Hit rate of each paged layer in the interval, in the model's order."""
        return [_hit_rate(*ends) for ends in zip(self.before["layers"], self.after["layers"], strict=True)]


class Figures:
    """Polls of one model; the first is made at once.

    Parameters
    ----------
    n_polls : int
        Number of later polls that are kept.
    """

    def __init__(self, llama: Llama, n_polls: int = 1) -> None:
        self._llama = llama
        self._polls = deque([self._look()], maxlen=n_polls + 1)

    def _look(self) -> tuple[float, dict[str, Any]]:
        return time.monotonic(), self._llama.rotary_stats()

    @property
    def stats(self) -> dict[str, Any]:
        """`Llama.rotary_stats()` at the last poll."""
        return self._polls[-1][1]

    def poll(self) -> Interval:
        """Read the counters again; return the interval since the last poll."""
        self._polls.append(self._look())
        return self.last()

    def last(self) -> Interval:
        """Interval between the last two polls; empty after the first."""
        return _between(self._polls[max(0, len(self._polls) - 2)], self._polls[-1])

    def window(self) -> Interval:
        """Interval between the first and the last poll that are kept."""
        return _between(self._polls[0], self._polls[-1])

    def hit_rates(self) -> list[float | None]:
        """Hit rates of the intervals between the polls that are kept, oldest first."""
        return [_between(*ends).hit_rate for ends in pairwise(self._polls)]


def prompt_share(llama: Llama, n_tokens: int, stats: dict[str, Any]) -> float | None:
    """Share of the prompt that is computed, 0 to 1; None where lookups do not show it."""
    if stats["path"] != "slots":  # on other paths, lookups are counted before they are computed
        return None
    return min(1.0, stats["lookups"] / (stats["n_layers"] * n_ubatches(llama, n_tokens)))


def n_ubatches(llama: Llama, n_tokens: int) -> int:
    """Number of graphs that llama.cpp makes of a prompt; each looks up every paged layer once."""
    n_ubatch = llama.context_params.n_ubatch
    n_full, n_left = divmod(n_tokens, llama.n_batch)
    return n_full * -(-llama.n_batch // n_ubatch) + -(-n_left // n_ubatch)


def _between(first: tuple[float, dict[str, Any]], last: tuple[float, dict[str, Any]]) -> Interval:
    return Interval(last[0] - first[0], first[1], last[1])


def _hit_rate(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    return ratio(after["hits"] - before["hits"], after["requests"] - before["requests"])
