# SPDX-License-Identifier: MIT
"""The slots of one model: a `Pool` on each device that llama.cpp splits the layers over, together `Pools`.

Figures of `Pools` are sums over devices; a budget in bytes is for all devices, and is divided in
proportion to their experts. A pool is used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..config import Budget, RotaryConfig
from ..errors import RotaryError
from ..policies import AUTO
from ..predictors import ROUTER, PrefetchPolicy
from ..predictors import Factory as PredictorFactory
from ..traces.profiles import Profile
from .binding import Library, native_log_muted
from .own import OwnPolicy, OwnPredictor, named_or_own

# Figures whose value for several devices is the largest, not the sum.
_LARGEST = ("n_expert", "n_expert_used", "repacked")
_PATHS = ("slots", "mapped", "resident")  # the first of these that any device has


class Pool:
    """The slots of one model on one device. Close it after the model's buffers are freed."""

    def __init__(
        self,
        lib: Library,
        device: int,
        *,
        budget: str,
        model: str,
        margin_bytes: int,
        repack: bool,
        direct: bool,
        store: str,
        prefetch: bool,
        staging_bytes: int,
        pin: str,
        policy: tuple[str, Any],
        predictor: tuple[str, Any],
        adaptive: bool,
    ) -> None:
        """Open a pool; `policy` and `predictor` are a name and callbacks or NULL, which are kept alive."""
        self.lib = lib
        self.device = device
        self._own = (policy[1], predictor[1])
        # The texts need to live only during the call, because the library copies them.
        named = (budget, model, store, pin, policy[0], predictor[0])
        texts = [lib.ffi.new("char[]", text.encode()) for text in named]
        config = lib.ffi.new("rotary_config *", {
            "struct_size": lib.ffi.sizeof("rotary_config"), "budget": texts[0], "model": texts[1],
            "margin_bytes": margin_bytes, "repack": repack, "direct": direct, "store": texts[2],
            "prefetch": prefetch, "staging_bytes": staging_bytes, "pin": texts[3],
            "policy": texts[4], "own_policy": policy[1],
            "predictor": texts[5], "own_predictor": predictor[1], "adaptive": adaptive,
        })  # fmt: skip
        with native_log_muted():
            self._pool = lib.c.rotary_pool_open(device, config)
        if not self._pool:
            lib.check(lib.c.rotary_last_status())

    def prepare(self) -> None:
        """Resolve the budget and allocate the slots now."""
        with native_log_muted():
            self.lib.check(self.lib.c.rotary_pool_prepare(self._pool))

    def set_budget(self, text: str) -> None:
        """Change the budget; slots are allocated anew, empty, at the next graph or `prepare`."""
        with native_log_muted():
            self.lib.check(self.lib.c.rotary_pool_set_budget(self._pool, text.encode()))

    def stats(self) -> dict[str, Any]:
        """Return the fields of struct rotary_stats, with `path`, `store` and `io` by name."""
        return self._fields("rotary_stats", self.lib.c.rotary_pool_stats)

    def layer_stats(self) -> list[dict[str, Any]]:
        """Return the fields of struct rotary_layer_stats for each paged layer.

        Some layers are missing while another thread loads weights, such as an adapter's, because the pool
        then forms its layers anew.
        """
        layers: list[dict[str, Any]] = []
        with native_log_muted(), contextlib.suppress(RotaryError):
            for i in range(self.stats()["n_layers"]):
                layers.append(self._fields("rotary_layer_stats", self.lib.c.rotary_pool_layer_stats, i))
        return layers

    def _fields(self, struct: str, function: Any, *args: int) -> dict[str, Any]:
        ffi = self.lib.ffi
        out = ffi.new(f"{struct} *")
        self.lib.check(function(self._pool, *args, out))
        fields = {name: getattr(out, name) for name, _ in ffi.typeof(struct).fields if name != "reserved"}
        for name in fields.keys() & {"path", "store", "io"}:
            constant = ffi.typeof(f"enum rotary_{name}").elements[fields[name]]
            fields[name] = constant.removeprefix(f"ROTARY_{name.upper()}_").lower()
        return fields

    def trace(self, on: bool) -> None:
        """Record routings from now on, or stop."""
        self.lib.check(self.lib.c.rotary_pool_trace(self._pool, on))

    def read_trace(self) -> tuple[list[int], int]:
        """Take the numbers recorded so far (see rotary.h), and how many lookups were dropped."""
        ffi, dropped = self.lib.ffi, self.lib.ffi.new("uint64_t *")
        n = self.lib.c.rotary_pool_trace_read(self._pool, ffi.NULL, -1, dropped)
        records = ffi.new("int32_t[]", max(n, 1))
        n = self.lib.c.rotary_pool_trace_read(self._pool, records, n, dropped)
        return ffi.unpack(records, n) if n else [], dropped[0]

    def warm(self, layer: int, experts: list[int]) -> None:
        """Set the experts that fill a layer's slots at first, most wanted first. Call before `prepare`."""
        self.lib.check(self.lib.c.rotary_pool_warm(self._pool, layer, experts, len(experts)))

    def learn(self, layer: int, popularity: Any, pairs: Any, n_tokens: int) -> None:
        """Hand over a layer's part of a profile: float32 [n_expert], and [n_expert, n_expert] or None."""
        ffi = self.lib.ffi
        self.lib.check(
            self.lib.c.rotary_pool_learn(
                self._pool, layer, ffi.from_buffer("float[]", popularity),
                ffi.NULL if pairs is None else ffi.from_buffer("float[]", pairs), len(popularity), n_tokens,
            )
        )  # fmt: skip

    def predictor_name(self) -> str:
        """Name of the predictor; empty where nothing is prefetched."""
        text = self.lib.ffi.new("char[]", 64)
        self.lib.c.rotary_pool_predictor(self._pool, text, len(text))
        return self.lib.text(text)

    def policy_name(self) -> str:
        """Name of the eviction policy that was chosen."""
        return self.lib.text(self.lib.c.rotary_pool_policy(self._pool))

    def notices(self) -> list[str]:
        """Fallbacks and choices worth a message, in the order they were made."""
        texts: list[str] = []
        while pointer := self.lib.c.rotary_pool_notice(self._pool, len(texts)):
            texts.append(self.lib.text(pointer))
        return texts

    def reset_counters(self) -> None:
        """Start counting anew."""
        self.lib.c.rotary_pool_reset_counters(self._pool)

    def close(self) -> None:
        """Drop the pool. Idempotent."""
        if self._pool:
            pool, self._pool = self._pool, None
            self.lib.c.rotary_pool_close(pool)


class Pools:
    """The pools of one model. Open before the model is loaded, close after the model's buffers are freed.

    Parameters
    ----------
    devices : list of int
        Numbers of the ROTARY devices.
    model : str
        Name of the model in messages.
    """

    def __init__(self, lib: Library, devices: list[int], config: RotaryConfig, model: str) -> None:
        self.lib = lib
        self.inner_device = ", ".join(lib.inner(device) for device in devices)
        self._budget = config.parsed_budget
        self._own = None if isinstance(config.policy, str) else OwnPolicy(lib, config.policy, self._shape)
        self._predictors: list[OwnPredictor] = []
        self._profile: Profile | None = None
        # Not for the predictor that stands in where there are no routers: tables of pairs are large.
        self._learns = isinstance(config.prefetch, str) and config.prefetch not in (AUTO, ROUTER)
        self._pools: list[Pool] = []
        try:
            for device in devices:
                self._pools.append(
                    Pool(
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
        """Resolve the budget and allocate the slots. Call when the weights are loaded."""
        if self._budget.kind == "bytes" and len(self._pools) > 1:
            self._divide()
        with self.raising_own():
            for pool in self._pools:
                pool.prepare()

    def set_budget(self, budget: Budget) -> None:
        """Change the budget and allocate slots anew."""
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
        """Name and callbacks of the predictor of one pool; each pool has a predictor for its own layers."""
        if isinstance(prefetch, (bool, str)):
            return (prefetch if isinstance(prefetch, str) else AUTO, self.lib.ffi.NULL)

        def shape() -> tuple[int, int, int]:
            stats = self._pools[index].stats()
            return stats["n_layers"], stats["n_expert"], stats["n_expert_used"]

        def made(predictor: PrefetchPolicy) -> None:
            if self._profile is not None and predictor.n_layers == len(self._profile.layers):
                predictor.learn(self._profile)

        self._predictors.append(OwnPredictor(self.lib, prefetch, shape, made))
        return AUTO, self._predictors[-1].calls

    def learn(self, profile: Profile) -> None:
        """Let predictors begin with a profile. Call before `prepare`."""
        self._profile = profile
        for pool in self._pools if self._learns else ():
            for i, layer in enumerate(profile.layers):
                pairs = np.ascontiguousarray(profile.pairs[i - 1], np.float32) if i else None
                pool.learn(layer, profile.popularity[i], pairs, profile.n_tokens)

    def warm(self, ranked: dict[int, list[int]]) -> None:
        """Set the experts that fill slots at first, by layer, most wanted first. Call before `prepare`."""
        for pool in self._pools:
            for layer, experts in ranked.items():
                pool.warm(layer, experts)

    def policy_name(self) -> str:
        """Name of the eviction policy that was chosen, or of its class."""
        if self._own is not None:
            return self._own.name
        return self._pools[0].policy_name()

    def predictor_name(self) -> str:
        """Name of the predictor or of its class; empty where nothing is prefetched."""
        found = self._pools[0].predictor_name()
        return self._predictors[0].name if found == "own" else found

    @contextlib.contextmanager
    def raising_own(self) -> Iterator[None]:
        """Raise at the end what a policy or predictor in Python raised while the library called it."""
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
        # Ctrl-C comes first, because it is meant for the whole program.
        return min(errors, key=lambda error: isinstance(error, Exception), default=None)

    def _every_own(self) -> list[OwnPolicy | OwnPredictor]:
        return [*([] if self._own is None else [self._own]), *self._predictors]

    def trace(self, on: bool) -> None:
        """Record routings from now on, or stop."""
        for pool in self._pools:
            pool.trace(on)

    def read_trace(self) -> tuple[list[int], int]:
        """Numbers recorded so far, device by device, and lookups dropped; see `Pool.read_trace`."""
        numbers: list[int] = []
        n_dropped = 0
        for pool in self._pools:
            recorded, dropped = pool.read_trace()
            numbers += recorded
            n_dropped += dropped
        return numbers, n_dropped

    def _divide(self) -> None:
        n_bytes = [pool.stats()["expert_bytes"] for pool in self._pools]
        for pool, share in zip(self._pools, n_bytes, strict=True):
            if share > 0:
                pool.set_budget(str(math.ceil(self._budget.amount * share / sum(n_bytes))))

    def stats(self) -> dict[str, Any]:
        """Figures of all devices together; see `Pool.stats`."""
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
        """Fallbacks and choices worth a message."""
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
