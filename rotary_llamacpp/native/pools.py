# SPDX-License-Identifier: MIT
"""The pools of one model, one for each device it is split over, as one.

llama.cpp splits the layers; each device pages those it got. Figures are the sums over devices; a budget in
bytes is for all of them, and divided as the experts are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..config import Budget, RotaryConfig
from ..policies import AUTO
from ..predictors import ROUTER, PrefetchPolicy
from ..predictors import Factory as PredictorFactory
from ..traces.profiles import Profile
from . import binding
from .own import OwnPolicy, OwnPredictor, named_or_own

# Of several devices' figures, what is not their sum.
_LARGEST = ("n_expert", "n_expert_used", "repacked")
_PATHS = ("slots", "mapped", "resident")  # the first that any device has says how the model runs


class Pools:
    """Open before the model is loaded; close after its buffers are gone.

    Parameters
    ----------
    devices : list of int
        Numbers of the ROTARY devices.
    model : str
        Name for messages.
    """

    def __init__(self, lib: binding.Library, devices: list[int], config: RotaryConfig, model: str) -> None:
        self.lib = lib
        self.inner_device = ", ".join(lib.inner(device) for device in devices)
        self._budget = Budget.parse(config.budget)
        self._own = None if isinstance(config.policy, str) else OwnPolicy(lib, config.policy, self._shape)
        self._predictors: list[OwnPredictor] = []
        self._profile: Profile | None = None
        # Not for what stands in for routers only where there are none: tables of pairs are large.
        self._learns = isinstance(config.prefetch, str) and config.prefetch not in (AUTO, ROUTER)
        self._pools: list[binding.Pool] = []
        try:
            for device in devices:
                self._pools.append(
                    binding.Pool(
                        lib,
                        device,
                        budget=self._budget.text,
                        model=model,
                        repack=config.repack,
                        margin_bytes=config.margin_bytes,
                        direct=config.direct,
                        store=config.store,
                        prefetch=config.prefetch is not False,
                        staging_bytes=config.staging_bytes,
                        pin=config.pin,
                        policy=named_or_own(lib, config.policy, self._own),
                        predictor=self._predictor(config.prefetch, len(self._pools)),
                        adaptive=config.split == "adaptive",
                    )
                )
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """Resolve the budget and allocate the slots. Call once the weights are loaded."""
        if self._budget.kind == "bytes" and len(self._pools) > 1:
            self._divide()
        with self.raising_own():
            for pool in self._pools:
                pool.prepare()

    def set_budget(self, budget: Budget) -> None:
        """Change the budget and allocate anew."""
        self._budget = budget
        if self._own is not None:
            self._own.restart()
        for pool in self._pools:
            pool.set_budget(budget.text)
        self.prepare()

    def _shape(self, il: int) -> tuple[int, int]:
        layer = next(layer for layer in self.layer_stats() if layer["il"] == il)
        return layer["n_expert"], layer["n_slots"]

    def _predictor(self, prefetch: bool | str | PredictorFactory, index: int) -> tuple[str, Any]:
        """What one pool's predictor is, as the library takes it: each has its own, of its own layers."""
        if isinstance(prefetch, (bool, str)):
            return (prefetch if isinstance(prefetch, str) else AUTO, self.lib.ffi.NULL)

        def shape() -> tuple[int, int, int]:
            stats = self._pools[index].stats()
            return stats["n_layers"], stats["n_expert"], stats["n_expert_used"]

        def made(its: PrefetchPolicy) -> None:
            if self._profile is not None and its.n_layers == len(self._profile.layers):
                its.learn(self._profile)

        self._predictors.append(OwnPredictor(self.lib, prefetch, shape, made))
        return AUTO, self._predictors[-1].calls

    def learn(self, profile: Profile) -> None:
        """What predictors begin with. Before `prepare`."""
        self._profile = profile
        for pool in self._pools if self._learns else ():
            for i, layer in enumerate(profile.layers):
                pairs = np.ascontiguousarray(profile.pairs[i - 1], np.float32) if i else None
                pool.learn(layer, profile.popularity[i], pairs, profile.n_tokens)

    def warm(self, ranked: dict[int, list[int]]) -> None:
        """What slots begin with, by layer, the most wanted expert first. Before `prepare`."""
        for pool in self._pools:
            for layer, experts in ranked.items():
                pool.warm(layer, experts)

    def policy_name(self) -> str:
        """The eviction policy that was chosen, or the name of the class that is one."""
        if self._own is not None:
            return self._own.name
        return self._pools[0].policy_name()

    def predictor_name(self) -> str:
        """Who names what comes ahead, or the name of the class that does; empty where nothing comes ahead."""
        found = self._pools[0].predictor_name()
        return self._predictors[0].name if found == "own" else found

    @contextlib.contextmanager
    def raising_own(self) -> Iterator[None]:
        """Raise at the end what a policy or predictor written in Python raises in a call of the library."""
        try:
            yield
        except BaseException as failure:
            error = self._take_error()
            if error is not None and isinstance(failure, Exception):
                raise error from failure
            raise
        if error := self._take_error():
            raise error

    def _take_error(self) -> BaseException | None:
        errors = [error for own in self._every_own() if (error := own.take_error()) is not None]
        # Ctrl-C first: it is for the whole program.
        return min(errors, key=lambda error: isinstance(error, Exception), default=None)

    def _every_own(self) -> list[OwnPolicy | OwnPredictor]:
        return [*([] if self._own is None else [self._own]), *self._predictors]

    def trace(self, on: bool) -> None:
        """Record routings from now on, or stop."""
        for pool in self._pools:
            pool.trace(on)

    def read_trace(self) -> tuple[list[int], int]:
        """As `binding.Pool.read_trace`, device by device."""
        numbers: list[int] = []
        n_dropped = 0
        for pool in self._pools:
            its, dropped = pool.read_trace()
            numbers += its
            n_dropped += dropped
        return numbers, n_dropped

    def _divide(self) -> None:
        n_bytes = [pool.stats()["expert_bytes"] for pool in self._pools]
        for pool, share in zip(self._pools, n_bytes, strict=True):
            if share > 0:
                pool.set_budget(str(math.ceil(self._budget.amount * share / sum(n_bytes))))

    def stats(self) -> dict[str, Any]:
        """As `binding.Pool.stats`, of all devices together."""
        every = [stats for pool in self._pools if (stats := pool.stats())["n_layers"] > 0]
        every = every or [self._pools[0].stats()]
        if len(every) == 1:
            return every[0]
        merged: dict[str, Any] = {}
        for name, value in every[0].items():
            values = [stats[name] for stats in every]
            if isinstance(value, str):
                merged[name] = next((path for path in _PATHS if path in values), value)
            elif name in _LARGEST:
                merged[name] = max(values)
            else:
                merged[name] = min(values) if name == "n_slots" else sum(values)
        return merged

    def layer_stats(self) -> list[dict[str, Any]]:
        """The figures of each paged layer, in the model's order."""
        layers = [layer for pool in self._pools for layer in pool.layer_stats()]
        return sorted(layers, key=lambda layer: layer["il"])

    def notices(self) -> list[str]:
        """Fallbacks and choices worth saying."""
        every = [*(pool.notices() for pool in self._pools), *(own.notices for own in self._every_own())]
        return [text for notices in every for text in notices]

    def reset_counters(self) -> None:
        """Start counting anew."""
        for pool in self._pools:
            pool.reset_counters()

    def close(self) -> None:
        """Drop the pools. Idempotent."""
        for pool in self._pools:
            pool.close()
