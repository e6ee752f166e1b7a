# SPDX-License-Identifier: MIT
"""Policies and predictors written in Python, as the library calls them: from the thread that computes.

What one raises cannot pass through the library: it is kept, and raised once, by `_Own.check`, when the call
has returned in which it was raised. After an exception of its own, something simple takes its place for good,
which `_Own.notices` says. After Ctrl-C, which merely met it, it is made anew. Either begins amid a model's
life, so a policy is told of residents when it first meets them.
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
        """Have something simple in its place; says what."""
        raise NotImplementedError

    def restart(self) -> None:
        """Begin anew."""
        raise NotImplementedError

    def _failed(self, _: type[BaseException], error: BaseException, traceback: Any) -> None:
        self._error = error.with_traceback(traceback)

    def bind(self, struct: str, functions: dict[str, Callable[..., Any]], at_error: dict[str, int]) -> Any:
        """A C struct of callbacks without the first argument, the library's `user`; `self` keeps them alive.

        From an error to the end of the library's call they are not called: what begins anew begins with a
        graph, not amid its layers.
        """
        types = dict(self.ffi.typeof(struct).fields)

        def bound(name: str, function: Callable[..., Any]) -> Any:
            def call(_: Any, *args: Any) -> Any:
                return function(*args) if self._error is None else at_error.get(name)

            # cffi takes errors: Ctrl-C may come before a function of ours has begun to catch any.
            return self.ffi.callback(types[name].type, call, error=at_error.get(name), onerror=self._failed)

        self._callbacks = {name: bound(name, each) for name, each in functions.items()}
        return self.ffi.new(f"{struct} *", self._callbacks)

    def rows(self, array: Any, n_used: int, n_tokens: int) -> list[list[Any]]:
        """An array [n_tokens][n_used] as lists."""
        flat = self.ffi.unpack(array, n_used * n_tokens)
        return [flat[i : i + n_used] for i in range(0, len(flat), n_used)]

    def take_error(self) -> BaseException | None:
        """What it has raised since this was last asked."""
        error, self._error = self._error, None
        if isinstance(error, Exception):
            name, instead = self.name, self.replace()
            self.notices.append(f"{name}: raised {type(error).__name__}: {error}; {instead}")
        if error is not None:
            self.restart()
        return error

    def check(self) -> None:
        """Raise what it has raised, once."""
        error = self.take_error()
        if error is not None:
            raise error


class OwnPolicy(_Own):
    """An eviction policy; `shape` gives n_expert and n_slots of a layer."""

    def __init__(self, lib: Library, factory: PolicyFactory, shape: Callable[[int], tuple[int, int]]) -> None:
        super().__init__(lib, factory)
        self._factory = factory
        self.restart()

        def of(layer: int) -> tuple[EvictionPolicy, set[int]]:
            """A layer's policy, and those of whom it knows that they are resident."""
            if layer not in self._layers:
                self._layers[layer] = self._factory(layer, *shape(layer), self._shared), set()
            return self._layers[layer]

        def note(layer: int, ids: Any, weights: Any, n_used: int, n_tokens: int) -> None:
            known = self.rows(weights, n_used, n_tokens) if weights else None
            of(layer)[0].note(self.rows(ids, n_used, n_tokens), known)

        def enter(layer: int, expert: int, wanted: int) -> None:
            its, residents = of(layer)
            if expert in residents:  # the slots were allocated anew since
                its.leave(expert)
            residents.add(expert)
            its.enter(expert, bool(wanted))

        def leave(layer: int, expert: int) -> None:
            its, residents = of(layer)
            if expert in residents:
                residents.remove(expert)
                its.leave(expert)

        def resize(layer: int, n_slots: int) -> None:
            of(layer)[0].resize(n_slots)

        def choose(layer: int, candidates: Any, n: int) -> int:
            its, residents = of(layer)
            experts = self.ffi.unpack(candidates, n)
            for expert in experts:
                if expert not in residents:
                    residents.add(expert)
                    its.enter(expert, False)
            return its.choose(experts)

        every = {each.__name__: each for each in (note, enter, leave, resize, choose)}
        self.calls = self.bind("rotary_policy", every, {"choose": -1})

    def replace(self) -> str:
        self._factory, self.name = Lru, "lru"
        return "lru takes its place"

    def restart(self) -> None:
        """The slots are allocated anew, and empty; or nothing is known of them any more."""
        self._shared: dict[str, Any] = {}
        self._layers: dict[int, tuple[EvictionPolicy, set[int]]] = {}


class _Nothing(PrefetchPolicy):
    """Names nothing."""

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        return []


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
        self._factory = factory
        self._its: PrefetchPolicy | None = None

        def its() -> PrefetchPolicy:
            if self._its is None:
                new = self._factory(*shape())
                made(new)
                self._its = new
            return self._its

        def note(layer: int, ids: Any, n_used: int, n_tokens: int) -> None:
            its().note(layer, self.rows(ids, n_used, n_tokens))

        def name(layer: int, ahead: int, experts: Any, n: int) -> int:
            named = list(its().name(layer, ahead, n))[:n]
            experts[0 : len(named)] = named
            return len(named)

        self.calls = self.bind("rotary_predictor", {"note": note, "name": name}, {"name": 0})

    def replace(self) -> str:
        self._factory, self.name = _Nothing, ""
        return "nothing comes ahead from now on"

    def restart(self) -> None:
        """Make it anew when it is next asked."""
        self._its = None


def named_or_own(lib: Library, given: Any, own: _Own | None) -> tuple[str, Any]:
    """A policy or predictor as the library takes it: its name, and its calls if it is a Python one."""
    return (given, lib.ffi.NULL) if own is None else ("auto", own.calls)  # type: ignore[attr-defined]
