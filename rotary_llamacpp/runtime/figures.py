# SPDX-License-Identifier: MIT
"""A running model's counters, polled, and what happened between polls. Draws nothing.

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
    """Between two polls, counters not reset meanwhile. A rate over nothing is None.

    Parameters
    ----------
    seconds : float
        Wall time.
    before, after : dict
        `Llama.rotary_stats()` at its ends.
    """

    seconds: float
    before: dict[str, Any]
    after: dict[str, Any]

    def per_second(self, counter: str) -> float | None:
        """How fast a counter grew, in its own unit."""
        return ratio(self.after[counter] - self.before[counter], self.seconds)

    def share_of_time(self, counter: str) -> float:
        """Part of the wall time that went to what a counter of microseconds counts.

        It is counted once it is over, so what began before the interval may make this more than 1.
        """
        return (self.per_second(counter) or 0.0) / 1e6

    @property
    def hit_rate(self) -> float | None:
        """Of the requests in the interval, 0 to 1."""
        return _hit_rate(self.before, self.after)

    @property
    def layer_hit_rates(self) -> list[float | None]:
        """The same of each paged layer, in the model's order."""
        return [_hit_rate(*ends) for ends in zip(self.before["layers"], self.after["layers"], strict=True)]


class Figures:
    """Polls of one model; the first is made at once.

    Parameters
    ----------
    n_polls : int
        How many later ones are kept.
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
        """Read the counters once more; what happened since the last time."""
        self._polls.append(self._look())
        return self.last()

    def last(self) -> Interval:
        """Between the last two polls, or the only one and itself."""
        return _between(self._polls[max(0, len(self._polls) - 2)], self._polls[-1])

    def window(self) -> Interval:
        """Between the first and the last poll that are kept."""
        return _between(self._polls[0], self._polls[-1])

    def hit_rates(self) -> list[float | None]:
        """Of each interval between the polls that are kept, the oldest first."""
        return [_between(*ends).hit_rate for ends in pairwise(self._polls)]


def prompt_share(llama: Llama, n_tokens: int, stats: dict[str, Any]) -> float | None:
    """How much of the prompt is computed, 0 to 1; None where that cannot be told from lookups."""
    if stats["path"] != "slots":  # counted, but not computed yet
        return None
    return min(1.0, stats["lookups"] / (stats["n_layers"] * n_ubatches(llama, n_tokens)))


def n_ubatches(llama: Llama, n_tokens: int) -> int:
    """Number of graphs that llama.cpp makes of a prompt; each looks every paged layer up once."""
    n_ubatch = llama.context_params.n_ubatch
    n_full, n_left = divmod(n_tokens, llama.n_batch)
    return n_full * -(-llama.n_batch // n_ubatch) + -(-n_left // n_ubatch)


def _between(first: tuple[float, dict[str, Any]], last: tuple[float, dict[str, Any]]) -> Interval:
    return Interval(last[0] - first[0], first[1], last[1])


def _hit_rate(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    return ratio(after["hits"] - before["hits"], after["requests"] - before["requests"])
