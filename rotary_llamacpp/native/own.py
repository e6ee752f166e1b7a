# SPDX-License-Identifier: MIT
"""Callbacks into policies and predictors written in Python, from the thread that computes.

An exception cannot pass through the library. It is kept, and `_Own.check` raises it once, when the library's
call has returned. A policy or predictor that raised is replaced by a simple one for good, which
`_Own.notices` reports. One that was interrupted by Ctrl-C is made anew. Either way the new object begins in
the middle of a run, so a policy is told of resident experts when it first meets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..policies import EvictionPolicy, Lru
from ..policies import Factory as PolicyFactory
from ..predictors import Factory as PredictorFactory
from ..predictors import PrefetchPolicy

if TYPE_CHECKING:
    from .binding import Library


class _Own:
    def __init__(self, lib: Library, factory: Callable[..., Any]) -> None:
        self.ffi = lib.ffi
        self.name = getattr(factory, "__name__", "own")
        self.notices: list[str] = []
        self._error: BaseException | None = None

    def replace(self) -> str:
        """Replace a failed policy or predictor with a simple one; return a text for the notice."""
        raise NotImplementedError

    def restart(self) -> None:
        """Make the policy or predictor anew."""
        raise NotImplementedError

    def _failed(self, _: type[BaseException], error: BaseException, traceback: Any) -> None:
        self._error = error.with_traceback(traceback)

    def bind(self, struct: str, functions: dict[str, Callable[..., Any]], at_error: dict[str, int]) -> Any:
        """Make a C struct of callbacks, which do not get the first argument, `user`; `self` keeps them alive.

        After an error they do nothing until the library's call returns, so that an object that is made anew
        begins with a graph, not between two layers.
        """
        types = dict(self.ffi.typeof(struct).fields)

        def bound(name: str, function: Callable[..., Any]) -> Any:
            def call(_: Any, *args: Any) -> Any:
                return function(*args) if self._error is None else at_error.get(name)

            # cffi catches errors, because Ctrl-C may come before a function of ours can catch anything.
            return self.ffi.callback(types[name].type, call, error=at_error.get(name), onerror=self._failed)

        self._callbacks = {name: bound(name, each) for name, each in functions.items()}
        return self.ffi.new(f"{struct} *", self._callbacks)

    def rows(self, array: Any, n_used: int, n_tokens: int) -> list[list[Any]]:
        """Convert a C array [n_tokens][n_used] into lists."""
        flat = self.ffi.unpack(array, n_used * n_tokens)
        return [flat[i : i + n_used] for i in range(0, len(flat), n_used)]

    def take_error(self) -> BaseException | None:
        """Return the exception raised since the last call; replace or restart the object that raised it."""
        error, self._error = self._error, None
        if isinstance(error, Exception):
            name, instead = self.name, self.replace()
            self.notices.append(f"{name}: raised {type(error).__name__}: {error}; {instead}")
        if error is not None:
            self.restart()
        return error

    def check(self) -> None:
        """Raise an exception of the callbacks, once."""
        error = self.take_error()
        if error is not None:
            raise error


class OwnPolicy(_Own):
    """An eviction policy in Python; `shape` gives n_expert and n_slots of a layer."""

    def __init__(self, lib: Library, factory: PolicyFactory, shape: Callable[[int], tuple[int, int]]) -> None:
        super().__init__(lib, factory)
        self._factory = factory
        self.restart()

        def state(layer: int) -> tuple[EvictionPolicy, set[int]]:
            """Policy of a layer, and the experts that it knows to be resident."""
            if layer not in self._layers:
                self._layers[layer] = self._factory(layer, *shape(layer), self._shared), set()
            return self._layers[layer]

        def note(layer: int, ids: Any, weights: Any, n_used: int, n_tokens: int) -> None:
            known = self.rows(weights, n_used, n_tokens) if weights else None
            state(layer)[0].note(self.rows(ids, n_used, n_tokens), known)

        def enter(layer: int, expert: int, wanted: int) -> None:
            policy, residents = state(layer)
            if expert in residents:  # the slots have been allocated anew
                policy.leave(expert)
            residents.add(expert)
            policy.enter(expert, bool(wanted))

        def leave(layer: int, expert: int) -> None:
            policy, residents = state(layer)
            if expert in residents:
                residents.remove(expert)
                policy.leave(expert)

        def resize(layer: int, n_slots: int) -> None:
            state(layer)[0].resize(n_slots)

        def choose(layer: int, candidates: Any, n: int) -> int:
            policy, residents = state(layer)
            experts = self.ffi.unpack(candidates, n)
            for expert in experts:
                if expert not in residents:
                    residents.add(expert)
                    policy.enter(expert, False)
            return policy.choose(experts)

        every = {each.__name__: each for each in (note, enter, leave, resize, choose)}
        self.calls = self.bind("rotary_policy", every, {"choose": -1})

    def replace(self) -> str:
        self._factory, self.name = Lru, "lru"
        return "lru replaces it"

    def restart(self) -> None:
        """Forget all state: the slots are empty now, or a failed policy is replaced."""
        self._shared: dict[str, Any] = {}
        self._layers: dict[int, tuple[EvictionPolicy, set[int]]] = {}


class _Nothing(PrefetchPolicy):
    """Predicts nothing."""

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return []


class OwnPredictor(_Own):
    """A predictor in Python, made when it is first used; `shape` gives n_layers, n_expert and n_used."""

    def __init__(
        self,
        lib: Library,
        factory: PredictorFactory,
        shape: Callable[[], tuple[int, int, int]],
        made: Callable[[PrefetchPolicy], None] = lambda predictor: None,
    ) -> None:
        super().__init__(lib, factory)
        self._factory = factory
        self._predictor: PrefetchPolicy | None = None

        def predictor() -> PrefetchPolicy:
            if self._predictor is None:
                new = self._factory(*shape())
                made(new)
                self._predictor = new
            return self._predictor

        def note(layer: int, ids: Any, n_used: int, n_tokens: int) -> None:
            predictor().note(layer, self.rows(ids, n_used, n_tokens))

        def name(layer: int, ahead: int, experts: Any, n: int) -> int:
            named = list(predictor().name(layer, ahead, n))[:n]
            experts[0 : len(named)] = named
            return len(named)

        self.calls = self.bind("rotary_predictor", {"note": note, "name": name}, {"name": 0})

    def replace(self) -> str:
        self._factory, self.name = _Nothing, ""
        return "nothing is prefetched from now on"

    def restart(self) -> None:
        """Make the predictor anew when it is next used."""
        self._predictor = None


def named_or_own(lib: Library, given: Any, own: _Own | None) -> tuple[str, Any]:
    """Name and callbacks of a policy or predictor for the library; callbacks are NULL for a native one."""
    return (given, lib.ffi.NULL) if own is None else ("auto", own.calls)  # type: ignore[attr-defined]
