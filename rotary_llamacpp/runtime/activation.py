# SPDX-License-Identifier: MIT
"""Makes plain llama_cpp.Llama objects page their experts, wherever the class was imported.

Patches the class in place, so earlier ``from llama_cpp import Llama`` and llama_cpp.server are covered.
Objects made before stay as they are, and those made while active stay paged after ``deactivate()``. Safe from
any thread.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from ..config import RotaryConfig
from ..native.stock import llama_cpp
from .llama import Llama, signature_with_rotary
from .paging import Paging, construct

_lock = threading.Lock()
_stock_methods: dict[str, Any] = {}  # methods that were replaced; empty while inactive
_default: Any = "auto"
_AS_ACTIVATED = object()


def activate(rotary: Any = "auto") -> None:
    """Page the experts of every llama_cpp.Llama made from now on. Calling it again changes the default.

    Parameters
    ----------
    rotary : "auto", RotaryConfig, dict, str, int, float or None
        As in `Llama`; each constructor call may still pass another ``rotary``.
    """
    global _default
    RotaryConfig.from_any(rotary)  # refuses invalid values now, not in a later constructor
    with _lock:
        _default = rotary
        if _stock_methods:
            return
        paged_methods = {
            "__init__": _paged_init(llama_cpp.Llama.__init__),
            "__getstate__": _paged_getstate(llama_cpp.Llama.__getstate__),
            "rotary_stats": lambda self: _paging_of(self).stats(),
            "rotary_set_budget": lambda self, budget: _paging_of(self).set_budget(budget),
            "rotary_reset_stats": lambda self: _paging_of(self).reset(),
        }
        for name, method in paged_methods.items():
            _stock_methods[name] = vars(llama_cpp.Llama).get(name)
            setattr(llama_cpp.Llama, name, method)


def deactivate() -> None:
    """Make llama_cpp.Llama stock again. Does nothing while inactive."""
    with _lock:
        for name, method in _stock_methods.items():
            if method is None:
                delattr(llama_cpp.Llama, name)
            else:
                setattr(llama_cpp.Llama, name, method)
        _stock_methods.clear()


def _paging_of(llama: llama_cpp.Llama) -> Paging:
    paging = getattr(llama, "_rotary", None)
    if paging is None:
        paging = Paging(None)
        paging.reason = "made before activate()"
    return paging


def _paged_init(stock_init: Any) -> Any:
    @functools.wraps(stock_init)
    def __init__(self: Any, model_path: str, *, rotary: Any = _AS_ACTIVATED, **kwargs: Any) -> None:
        if isinstance(self, Llama):  # the subclass has handled `rotary` already
            stock_init(self, model_path, **kwargs)
        else:
            choice = _default if rotary is _AS_ACTIVATED else rotary
            construct(self, functools.partial(stock_init, self), model_path, choice, kwargs)

    __init__.__signature__ = signature_with_rotary(stock_init, "auto")  # type: ignore[attr-defined]
    return __init__


def _paged_getstate(stock_getstate: Any) -> Any:
    @functools.wraps(stock_getstate)
    def __getstate__(self: Any) -> dict[str, Any]:
        state = stock_getstate(self)
        return self._rotary.state(state) if "_rotary" in vars(self) and not isinstance(self, Llama) else state

    return __getstate__
