# SPDX-License-Identifier: MIT
"""Constructs a llama_cpp.Llama whose experts are paged, or one that runs as stock and says why.

The one flow behind the ``Llama`` subclass and ``activate()``. Uses stock's constructor as it is: the device
list, for which stock has no argument, is set in the default model params that the constructor asks for.

Threads: construction holds a process-wide lock, because a device collects the weights of one model at a time
and the hook on the default params is global. Everything else belongs to the thread that uses the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config import Budget, RotaryConfig
from ..errors import BudgetError, ModelError, RotaryError
from ..gguf_files.info import ModelInfo
from ..native import binding
from ..native.pools import Pools
from ..native.stock import llama_api
from ..traces import profiles
from ..units import MIB, mib, ratio

_construction = threading.RLock()
_NOT_PAGED: dict[str, Any] = {
    "active": False, "reason": None, "inner_device": None, "path": "none", "repacked": False,
    "policy": None, "predictor": None, "profile": None, "hit_rate": None,
    "budget_bytes": 0, "slot_bytes": 0, "expert_bytes": 0, "min_budget_bytes": 0,
    "staging_bytes": 0, "resident_bytes": 0, "locked_bytes": 0, "ram_bytes": 0, "store": "none", "io": "none",
    "n_layers": 0, "n_expert": 0, "n_expert_used": 0, "n_slots": 0,
    "lookups": 0, "device_lookups": 0, "requests": 0, "hits": 0, "misses": 0, "bypassed": 0,
    "evictions": 0, "bytes_paged": 0,
    "waves": 0, "waits": 0, "wait_us": 0, "page_us": 0,
    "ram_hits": 0, "reads": 0, "bytes_read": 0, "bytes_in_place": 0, "read_us": 0, "read_bandwidth": None,
    "stall_us": 0, "shrinks": 0, "slot_moves": 0,
    "predicted": 0, "predicted_right": 0, "prefetched": 0, "prefetch_used": 0, "late_hits": 0,
    "prefetch_accuracy": None, "prefetch_coverage": None, "prefetch_timeliness": None,
}  # fmt: skip


class _DefaultHandler(logging.Handler):
    """Shows our messages where the application has configured no logging, as logging does for warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and sys.stderr is not None:
            sys.stderr.write(self.format(record) + "\n")


logger = logging.getLogger("rotary_llamacpp")
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
logger.addHandler(_DefaultHandler())


class Paging:
    """Paging of one Llama object: the pools while the model lives, and the last figures after that."""

    def __init__(self, rotary: Any, n_gpu_layers: int | None = None) -> None:
        self.rotary = rotary  # this and the next attribute are kept as given, for pickling
        self.given_n_gpu_layers = n_gpu_layers
        self.reason: str | None = None  # why nothing is paged
        self.pools: Pools | None = None
        self.info: ModelInfo | None = None  # None unless the model is paged
        # Kept alive, because model_params points at it.
        self.devices: ctypes.Array[ctypes.c_void_p] | None = None
        self.no_repack = False
        self.level = logging.INFO  # for messages that are not warnings
        self.profile: str | None = None  # path, if slots began with the experts of one
        self.notices: list[str] = []
        self._closing = False
        # Guards figures, which one thread may read while another closes. Never held while waiting for a
        # graph, because a policy in Python may read figures during one.
        self._lock = threading.RLock()
        self._changing = threading.RLock()  # one change at a time, none during closing; taken before `_lock`
        self._last: dict[str, Any] = {**_NOT_PAGED, "layers": []}

    @property
    def is_default(self) -> bool:
        """Whether the caller left the choice to us, so that failing to page is not an error."""
        return isinstance(self.rotary, str) and self.rotary == "auto"

    # ---- construction

    def open(self, model_path: str, config: RotaryConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Choose devices and pools for the model; returns the arguments for stock's constructor."""
        if kwargs.get("vocab_only"):
            return self.step_aside("vocab_only loads no weights", kwargs)
        info = ModelInfo.read(model_path)
        if not info.is_moe:
            logger.log(self.level, "%s: dense model, paging does not apply", info.path.name)
            return self.step_aside("dense model, paging does not apply", kwargs)
        check_budget(config.parsed_budget, info, config.budget)
        lib = binding.load()
        devices = lib.devices_for(config.inner or ("CPU" if self.given_n_gpu_layers == 0 else None))
        self.pools = Pools(lib, devices, config, info.path.name)
        self.info = info
        self.devices = lib.device_list(devices)
        self.no_repack = not config.repack
        if kwargs.get("use_mlock"):
            self.notice(
                f"{info.path.name}: use_mlock locks the whole model in memory, so paging saves none; "
                "leave use_mlock out"
            )
        return {**kwargs, "n_gpu_layers": self.given_n_gpu_layers or -1}

    def step_aside(self, reason: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Run as stock does; if our library is loaded, on the devices that stock would choose without it."""
        self.reason = reason
        lib = binding.loaded()
        if lib is not None:
            self.devices = lib.devices_without_rotary()
        return kwargs

    def adjust(self, llama: Any, params: Any) -> None:
        """Set what stock's constructor has no argument for. Runs inside the constructor."""
        if self.devices is not None:
            params.devices = ctypes.cast(self.devices, ctypes.c_void_p)
        if self.no_repack:
            params.use_extra_bufts = False
        # First on the stack, so last to run: the model's buffers are gone by then.
        llama._stack.callback(self.close)

    def start(self, llama: Any, config: RotaryConfig) -> None:
        """Size the pools now that the contexts exist, and log what was chosen."""
        if self.pools is None:
            return
        self.warm(llama.model_path, config.profile)
        self.pools.prepare()
        _raise_our_errors(llama._ctx, self.pools)
        llama._stack.callback(self.keep_last_figures)  # last on the stack, so first to run
        stats = self.stats()
        logger.log(
            self.level,
            "%s: experts paged on %s, budget %s of %s, %d of %d slots per layer, store %s, path %s",
            os.path.basename(llama.model_path), stats["inner_device"], mib(stats["budget_bytes"]),
            mib(stats["expert_bytes"]), stats["n_slots"], stats["n_expert"], stats["store"],
            stats["path"],
        )  # fmt: skip

    def warm(self, model_path: str, chosen: str) -> None:
        """Let slots begin with the experts of the model's profile, if there is one."""
        assert self.pools is not None and self.info is not None
        if chosen == "off":
            return
        path = profiles.beside(model_path) if chosen == "auto" else Path(chosen)
        try:
            if chosen != "auto" or path.is_file():
                profile = profiles.load(path)
            elif (in_model := profiles.stored(model_path)) is not None:
                profile, path = in_model, Path(model_path)
            else:
                return
            layers = {layer.il: layer.n_expert for layer in self.info.layers}
            if profile.layers != sorted(layers) or profile.n_expert != max(layers.values()):
                raise RotaryError(
                    f"{path}: has {len(profile.layers)} layers of {profile.n_expert} experts, the model has "
                    f"{len(layers)} of {max(layers.values())}; make a profile of this model"
                )
            self.pools.warm({layer: profile.ranked(layer) for layer in profile.layers})
            self.pools.learn(profile)
        except RotaryError as error:
            if chosen != "auto":
                raise
            self.notice(f"slots begin empty: {error}")
            return
        self.profile = str(path)
        logger.log(
            self.level, "%s: slots begin with the experts of %s, %d tokens",
            os.path.basename(model_path), path.name, profile.n_tokens,
        )  # fmt: skip

    def notice(self, text: str) -> None:
        """Log a warning, unless the same was logged before."""
        if text not in self.notices:
            self.notices.append(text)
            logger.warning("%s", text)

    # ---- figures

    def keep_last_figures(self) -> None:
        """Read the figures for the last time: freeing the model empties the pools before they close."""
        with self._lock:
            self._refresh()
            self._closing = True

    def _refresh(self) -> None:
        # When the interpreter ends, a model that nobody closed is freed late, when cffi may be gone.
        if self.pools is None or self._closing or sys.is_finalizing():
            return
        for text in self.pools.notices():
            self.notice(text)
        figures = {name: value for name, value in self.pools.stats().items() if name in _NOT_PAGED}
        layers = [
            {**layer, "hit_rate": ratio(layer["hits"], layer["requests"])}
            for layer in self.pools.layer_stats()
        ]
        self._last = {
            **_NOT_PAGED,
            **figures,
            "active": True,
            "policy": self.pools.policy_name(),
            "predictor": self.pools.predictor_name(),
            "profile": self.profile,
            "inner_device": self.pools.inner_device,
            **_rates(figures),
            "repacked": bool(figures["repacked"]),
            "layers": layers,
        }

    def stats(self) -> dict[str, Any]:
        """Figures now, or the last ones of a closed model."""
        with self._lock:
            self._refresh()
            return {
                **self._last,
                "reason": self.reason,
                "notices": list(self.notices),
                "layers": [dict(layer) for layer in self._last["layers"]],
            }

    def set_budget(self, budget: str | int | float) -> None:
        """See `Llama.rotary_set_budget`."""
        with self._changing:
            if self.pools is None or self.info is None:
                raise RotaryError(
                    f"budget {budget!r}: cannot be set, {self.reason or 'the model is closed'}; "
                    "load the model with rotary="
                )
            parsed = Budget.parse(budget)
            check_budget(parsed, self.info, budget)
            self.pools.set_budget(parsed)

    def reset(self) -> None:
        """Set all counters to 0."""
        with self._lock:
            if self.pools is not None:
                self.pools.reset_counters()

    def close(self) -> None:
        """Close the pools; the last figures stay. Idempotent."""
        with self._changing, self._lock:
            pools, self.pools = self.pools, None
            if pools is not None and not sys.is_finalizing():
                pools.close()

    def state(self, stock_state: dict[str, Any]) -> dict[str, Any]:
        """Extend stock's pickling state by our argument, with n_gpu_layers as the caller gave it."""
        state = {**stock_state, "rotary": self.rotary}
        del state["n_gpu_layers"]
        if self.given_n_gpu_layers is not None:
            state["n_gpu_layers"] = self.given_n_gpu_layers
        return state


def check_budget(budget: Budget, info: ModelInfo, given: object) -> None:
    """Refuse a budget, written as `given`, that cannot hold one token's experts of this model.

    Raises
    ------
    BudgetError
        The budget is too small; the message names the minimum.
    """
    minimum = info.min_budget_bytes
    n_bytes = {
        "share": round(info.expert_bytes * budget.amount / 100),
        "bytes": budget.amount,
        "slots": minimum * budget.amount / info.n_expert_used,
    }.get(budget.kind, minimum)
    if n_bytes < minimum:
        n_used, n_layers = info.n_expert_used, len(info.layers)
        raise BudgetError(
            f"{info.path.name}: budget {given} is {mib(n_bytes)}; one token's {n_used} experts "
            f"per layer take {mib(minimum)} in {n_layers} layers; "
            f'use "min", "{n_used} slots" or {math.ceil(minimum / MIB)}MiB'
        )


def _rates(figures: dict[str, Any]) -> dict[str, float | None]:
    used = figures["prefetch_used"]
    return {
        "hit_rate": ratio(figures["hits"], figures["requests"]),
        "read_bandwidth": ratio(1e6 * figures["bytes_read"], figures["read_us"]),
        "prefetch_accuracy": ratio(used, figures["prefetched"]),
        "prefetch_coverage": ratio(used, figures["misses"]),
        "prefetch_timeliness": ratio(used - figures["late_hits"], used),
    }


def _raise_our_errors(context: Any, pools: Pools) -> None:
    """Make a context raise our library's error when a graph fails, instead of stock's bare number."""
    lib = pools.lib
    stock_decode = type(context).decode
    reference = weakref.proxy(context)  # not a cycle: a dropped model is freed at once

    def decode(batch: Any) -> None:
        lib.c.rotary_clear_error()
        with pools.raising_own():
            try:
                stock_decode(reference, batch)
            except RuntimeError:
                if lib.last_error():
                    lib.check(lib.c.rotary_last_status())
                raise  # llama.cpp or the inner device failed, not our library

    context.decode = decode


def construct(
    llama: Any, stock_init: Callable[..., None], model_path: str, rotary: Any, kwargs: dict[str, Any]
) -> None:
    """Run stock's constructor, paged as `rotary` says.

    Parameters
    ----------
    llama : llama_cpp.Llama
        The object under construction.
    stock_init : callable
        The stock ``__init__``, bound to the object.
    rotary : RotaryConfig, dict, str, int, float or None
        See `RotaryConfig.from_any`.
    """
    # Stock's close(), which __del__ calls, needs a stack even if we refuse before stock has made one.
    llama._stack = contextlib.ExitStack()
    paging = llama._rotary = Paging(rotary, kwargs.get("n_gpu_layers"))
    config = rotary if isinstance(rotary, RotaryConfig) else RotaryConfig.from_any(rotary)
    verbose = config.verbose if config is not None else None
    if not (kwargs.get("verbose", True) if verbose is None else verbose):
        paging.level = logging.DEBUG

    def run_stock(arguments: dict[str, Any]) -> None:
        with default_model_params(lambda params: paging.adjust(llama, params)):
            stock_init(model_path, **arguments)

    def undo() -> None:
        llama._stack.close()
        paging.close()

    with _construction:
        try:
            if config is None:
                run_stock(paging.step_aside("rotary is off", kwargs))
                return
            try:
                run_stock(paging.open(model_path, config, kwargs))
                paging.start(llama, config)
            except RotaryError as error:
                # A caller who left the choice to us gets what stock would do, rather than an error.
                if not paging.is_default:
                    raise
                undo()
                warning = f"{os.path.basename(model_path)}: runs without paging: {error}"
                if not isinstance(error, ModelError):
                    paging.notice(warning)
                try:
                    run_stock(paging.step_aside(str(error), kwargs))
                except ValueError as refusal:
                    if isinstance(error, ModelError):  # tells more about a file that stock cannot load either
                        raise error from refusal
                    raise
                paging.notice(warning)
        except BaseException:
            undo()
            raise


@contextlib.contextmanager
def default_model_params(adjust: Callable[[Any], None]) -> Iterator[None]:
    """Pass the default model params that this thread asks for to `adjust`."""
    stock = llama_api.llama_model_default_params
    thread = threading.get_ident()

    def hooked() -> Any:
        params = stock()
        if threading.get_ident() == thread:
            adjust(params)
        return params

    llama_api.llama_model_default_params = hooked
    try:
        yield
    finally:
        llama_api.llama_model_default_params = stock
