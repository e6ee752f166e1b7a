# SPDX-License-Identifier: MIT
"""Figures of a paged model, as ``Llama.rotary_stats()`` returns them: unchangeable dicts with attributes.

A snapshot shares nothing with the model, so any thread may keep it. docs/counters.md explains every figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

_DEFAULTS: dict[Any, Any] = {bool: False, int: 0, str: "none"}  # of figures that may be None, None


class _Figures(dict[str, Any]):
    """A dict that cannot be changed and whose items are attributes too."""

    if not TYPE_CHECKING:  # else any name would pass for an attribute

        def __getattr__(self, name: str) -> Any:
            try:
                return self[name]
            except KeyError:
                raise AttributeError(f"{type(self).__name__!r} has no figure {name!r}", name=name) from None

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({super().__repr__()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # copies and unpickled objects are not filled item by item

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: a snapshot cannot be changed; change what to_dict() returns")

    if not TYPE_CHECKING:  # the signatures are those of dict
        __setitem__ = __delitem__ = __ior__ = __setattr__ = __delattr__ = _refuse
        update = setdefault = pop = popitem = clear = _refuse


class LayerStats(_Figures):
    """Figures of one paged layer: ``layer["hits"]`` and ``layer.hits`` are the same.

    Sizes are in bytes, times in microseconds. Counters count from loading or `Llama.rotary_reset_stats`.
    """

    il: int  # number in the model
    n_expert: int
    n_expert_used: int
    n_slots: int
    path: str
    n_resident: int
    expert_bytes: int  # of one expert, all its tensors
    lookups: int
    requests: int
    hits: int
    misses: int
    bypassed: int
    evictions: int
    bytes_paged: int
    waves: int
    hit_rate: float | None  # 0 to 1; None before the first request

    def to_dict(self) -> dict[str, Any]:
        """Copy the figures into a plain dict, for JSON."""
        return dict(self)


class RotaryStats(_Figures):
    """Figures of a paged model at one moment: ``stats["hits"]`` and ``stats.hits`` are the same.

    A dict that cannot be changed, so ``json.dumps(stats)`` works. All keys are there, paged or not. Sizes are
    in bytes, times in microseconds, rates 0 to 1, or None over nothing. Counters count from loading or
    `Llama.rotary_reset_stats`. For several devices, sizes and counters are sums.
    """

    # what was chosen
    active: bool
    reason: str | None
    inner_device: str | None
    path: str
    repacked: bool
    policy: str | None
    predictor: str | None
    profile: str | None
    store: str
    io: str
    # sizes
    budget_bytes: int
    slot_bytes: int
    expert_bytes: int
    min_budget_bytes: int
    staging_bytes: int
    resident_bytes: int
    locked_bytes: int
    ram_bytes: int
    n_layers: int
    n_expert: int
    n_expert_used: int
    n_slots: int
    # lookups
    hit_rate: float | None
    lookups: int
    device_lookups: int
    requests: int
    hits: int
    misses: int
    bypassed: int
    evictions: int
    bytes_paged: int
    waves: int
    waits: int
    wait_us: int
    page_us: int
    shrinks: int
    slot_moves: int
    # direct reads
    ram_hits: int
    reads: int
    bytes_read: int
    bytes_in_place: int
    read_us: int
    read_bandwidth: float | None  # bytes per second
    stall_us: int
    # prefetch
    predicted: int
    predicted_right: int
    prefetched: int
    prefetch_used: int
    late_hits: int
    prefetch_accuracy: float | None
    prefetch_coverage: float | None
    prefetch_timeliness: float | None

    notices: list[str]
    layers: list[LayerStats]

    def to_dict(self) -> dict[str, Any]:
        """Copy the figures into plain dicts and lists, for JSON."""
        return {**self, "notices": list(self.notices), "layers": [layer.to_dict() for layer in self.layers]}


NOT_PAGED: dict[str, Any] = {  # figures of a model that is not paged, without its notices and layers
    name: _DEFAULTS.get(kind)
    for name, kind in get_type_hints(RotaryStats).items()
    if name not in ("notices", "layers")
}
