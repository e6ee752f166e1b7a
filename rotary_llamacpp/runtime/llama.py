# SPDX-License-Identifier: MIT
"""``Llama``: llama_cpp.Llama with paged experts. The flow is in paging.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..config import RotaryConfig
from ..native.stock import llama_cpp
from .paging import Paging, construct


def signature_with_rotary(stock_init: Callable[..., None], default: Any) -> inspect.Signature:
    """Signature of stock's constructor with our keyword before ``**kwargs``."""
    signature = inspect.signature(stock_init)
    *parameters, kwargs = signature.parameters.values()
    ours = inspect.Parameter(
        "rotary",
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation="RotaryConfig | Mapping[str, Any] | str | int | float | None",
    )
    return signature.replace(parameters=[*parameters, ours, kwargs])


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama whose experts are paged; takes all arguments of that class, and one more.

    Parameters
    ----------
    model_path : str
        A GGUF file, or the first shard of a split model. A dense model runs as stock.
    rotary : "auto", RotaryConfig, dict, str, int, float or None
        ``"auto"`` sizes the budget from free memory, and runs unpaged with a warning if the native library
        cannot be used. Text, an int of bytes or a float share is a budget; a dict has the fields of
        `RotaryConfig`. None, False or 0 is off. Anything but ``"auto"`` raises instead of falling back.
    **kwargs
        As in llama_cpp.Llama. Without ``n_gpu_layers``, all layers are on the paging device; 0 computes on
        the CPU.

    Raises
    ------
    RotaryError
        `BudgetError` before anything is loaded if the budget is below one token's experts, `ModelError` for a
        damaged file, `DeviceError` for an unknown inner device, `LibraryError` or `VersionError` if the
        native library cannot be used. Later, where stock raises RuntimeError because decoding failed,
        `ReadError` if the file could not be read, or another error of the native library.
    """

    _rotary: Paging

    def __init__(
        self,
        model_path: str,
        *,
        rotary: RotaryConfig | Mapping[str, Any] | str | int | float | None = "auto",
        **kwargs: Any,
    ) -> None:
        construct(self, super().__init__, model_path, rotary, kwargs)

    __init__.__signature__ = signature_with_rotary(llama_cpp.Llama.__init__, "auto")  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return self._rotary.state(super().__getstate__())

    def rotary_stats(self) -> dict[str, Any]:
        """Return what was chosen, and the counters since load or the last reset; after close(), the last.

        Returns
        -------
        dict
            ``active`` and, if not, ``reason``; ``inner_device``, ``path``, ``store``, ``n_slots`` and
            ``n_expert`` per layer, ``budget_bytes`` and other sizes; ``hit_rate`` (None before the first
            request), ``hits``, ``misses``, ``bytes_paged`` and other counters; for the direct store
            ``bytes_read``, ``read_bandwidth`` (bytes per second), ``prefetch_accuracy`` and the like;
            ``notices``; ``layers`` with the counters per layer.
        """
        return self._rotary.stats()

    def rotary_set_budget(self, budget: str | int | float) -> None:
        """Change the memory for experts, between runs. Slots are allocated anew and start empty.

        Parameters
        ----------
        budget : str, int or float
            As in `RotaryConfig`.

        Raises
        ------
        BudgetError
            The budget is not understood or is below one token's experts; the old one stays.
        LibraryError
            The slots cannot be allocated; the model does not run until a smaller budget is set.
        RotaryError
            Nothing is paged, or the model is closed.
        """
        self._rotary.set_budget(budget)

    def rotary_reset_stats(self) -> None:
        """Set all counters to 0; resident experts stay."""
        self._rotary.reset()
