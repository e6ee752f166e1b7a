# SPDX-License-Identifier: MIT
"""Base of predictors in Python. One object serves a device's layers; the thread that computes calls it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..policies import Routing
from ..traces.profiles import Profile


class PrefetchPolicy:
    """Base of predictors written in Python: one object for the layers of a device.

    Parameters
    ----------
    n_layers : int
        Number of paged layers; they are numbered from 0, in the model's order.
    n_expert, n_used : int
        Largest number of experts, and of experts used, in these layers.
    """

    def __init__(self, n_layers: int, n_expert: int, n_used: int) -> None:
        self.n_layers, self.n_expert, self.n_used = n_layers, n_expert, n_used

    def note(self, layer: int, ids: Routing) -> None:
        """See the routing of a layer, shape (n_tokens, n_used).

        The layers of a batch come in order. A layer that routes fewer tokens than the one before routes the
        last of them.
        """

    def learn(self, profile: Profile) -> None:
        """Begin with a profile of the model, if the predictor can use one."""

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        """Predict, after the routing of `layer`, what layer `ahead` wants: up to n experts, best first.

        The prediction is for the last token that was routed.
        """
        raise NotImplementedError


Factory = Callable[[int, int, int], PrefetchPolicy]


def best(score: NDArray[np.float64], n: int) -> list[int]:
    """Return the experts with the n highest scores above 0."""
    order = np.argsort(-score, kind="stable")[:n]
    return [int(expert) for expert in order if score[expert] > 0]
