# SPDX-License-Identifier: MIT
"""Policies and predictors written in Python, as the library calls them: from the thread that computes.

What one raises first is kept in `error`; from then on it is not called, and the library goes on as it can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .policies import EvictionPolicy
from .policies import Factory as PolicyFactory
from .predictors import Factory as PredictorFactory
from .predictors import PrefetchPolicy

if TYPE_CHECKING:
    from ._native import Library


class _Own:
    def __init__(self, lib: Library, factory: Callable[..., Any]) -> None:
        self.ffi = lib.ffi
        self.name = getattr(factory, "__name__", "own")
        self.error: BaseException | None = None

    def guarded(self, function: Callable[..., Any], at_error: Any = None) -> Callable[..., Any]:
        """`function` without its first argument, the library's `user`, until something has been raised."""

        def call(_: Any, *args: Any) -> Any:
            try:
                if self.error is None:
                    return function(*args)
            except BaseException as error:
                self.error = error
            return at_error

        return call

    def bind(self, struct: str, functions: dict[str, Callable[..., Any]]) -> Any:
        """A C struct of callbacks; `self` keeps them alive."""
        types = dict(self.ffi.typeof(struct).fields)
        self._callbacks = {
            name: self.ffi.callback(types[name].type, each) for name, each in functions.items()
        }
        return self.ffi.new(f"{struct} *", self._callbacks)

    def rows(self, array: Any, n_used: int, n_tokens: int) -> list[list[Any]]:
        """An array [n_tokens][n_used] as lists."""
        flat = self.ffi.unpack(array, n_used * n_tokens)
        return [flat[i : i + n_used] for i in range(0, len(flat), n_used)]

    def check(self) -> None:
        """Raise what it has raised."""
        if self.error is not None:
            raise self.error


class OwnPolicy(_Own):
    """An eviction policy; `shape` gives n_expert and n_slots of a layer."""

    def __init__(self, lib: Library, factory: PolicyFactory, shape: Callable[[int], tuple[int, int]]) -> None:
        super().__init__(lib, factory)
        self.restart()

        def of(layer: int) -> EvictionPolicy:
            if layer not in self._layers:
                self._layers[layer] = factory(layer, *shape(layer), self._shared)
            return self._layers[layer]

        def note(layer: int, ids: Any, weights: Any, n_used: int, n_tokens: int) -> None:
            known = self.rows(weights, n_used, n_tokens) if weights else None
            of(layer).note(self.rows(ids, n_used, n_tokens), known)

        def enter(layer: int, expert: int, wanted: int) -> None:
            of(layer).enter(expert, bool(wanted))

        def leave(layer: int, expert: int) -> None:
            of(layer).leave(expert)

        def resize(layer: int, n_slots: int) -> None:
            of(layer).resize(n_slots)

        def choose(layer: int, candidates: Any, n: int) -> int:
            return of(layer).choose(self.ffi.unpack(candidates, n))

        every = {each.__name__: self.guarded(each) for each in (note, enter, leave, resize)}
        self.calls = self.bind("rotary_policy", {**every, "choose": self.guarded(choose, -1)})

    def restart(self) -> None:
        """The slots are allocated anew, and empty."""
        self._shared: dict[str, Any] = {}
        self._layers: dict[int, EvictionPolicy] = {}


class OwnPredictor(_Own):
    """A predictor, made when it is first asked; `shape` gives n_layers, n_expert and n_used."""

    def __init__(
        self,
        lib: Library,
        factory: PredictorFactory,
        shape: Callable[[], tuple[int, int, int]],
        made: Callable[[PrefetchPolicy], None] = lambda its: None,
    ) -> None:
        super().__init__(lib, factory)
        self._its: PrefetchPolicy | None = None

        def its() -> PrefetchPolicy:
            if self._its is None:
                self._its = factory(*shape())
                made(self._its)
            return self._its

        def note(layer: int, ids: Any, n_used: int, n_tokens: int) -> None:
            its().note(layer, self.rows(ids, n_used, n_tokens))

        def name(layer: int, ahead: int, experts: Any, n: int) -> int:
            named = list(its().name(layer, ahead, n))[:n]
            experts[0 : len(named)] = named
            return len(named)

        self.calls = self.bind(
            "rotary_predictor", {"note": self.guarded(note), "name": self.guarded(name, 0)}
        )


def named_or_own(lib: Library, given: Any, own: _Own | None) -> tuple[str, Any]:
    """A policy or predictor as the library takes it: its name, and its calls if it is a Python one."""
    return (given, lib.ffi.NULL) if own is None else ("auto", own.calls)  # type: ignore[attr-defined]
