# SPDX-License-Identifier: MIT
"""Slot tables and predictors of the native library without a model, to replay traces on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import RotaryError
from ..policies import Factory, Routing
from ..predictors import PrefetchPolicy
from ..traces.profiles import Profile
from .binding import Library
from .own import OwnPolicy, named_or_own


class Cache:
    """Slot tables of all layers of a model, with one eviction policy.

    Parameters
    ----------
    policy : str or class
        A name, or a class as in `rotary_llamacpp.policies`.
    n_slots : list of int
        Slots of each layer.
    min_slots : int, optional
        Rebalance slots between layers, and leave each layer at least this many.
    """

    def __init__(
        self,
        lib: Library,
        policy: Factory | str,
        n_expert: int,
        n_slots: list[int],
        min_slots: int | None = None,
    ) -> None:
        self.lib, self.n_slots = lib, n_slots
        self._own = (
            None
            if isinstance(policy, str)
            else OwnPolicy(lib, policy, lambda layer: (n_expert, n_slots[layer]))
        )
        named, own = named_or_own(lib, policy, self._own)
        pointer = lib.c.rotary_cache_new(
            named.encode(), own, len(n_slots), n_expert, n_slots, min_slots is not None, min_slots or 0
        )
        if not pointer:
            lib.check(lib.c.rotary_last_status())
        self._cache = lib.ffi.gc(pointer, lib.c.rotary_cache_free)
        self._slots = [lib.c.rotary_cache_layer(self._cache, layer) for layer in range(len(n_slots))]
        self._loads = lib.ffi.new("rotary_load[]", n_expert)

    def resolve(self, layer: int, ids: Any, weights: Any = None) -> list[tuple[int, int, int]]:
        """Look up int32 ids [n_tokens, n_used] with float32 weights; return loads (expert, slot, evicted)."""
        ffi = self.lib.ffi
        slot_ids = ffi.new("int32_t[]", ids.size)
        n = self.lib.c.rotary_cache_resolve(
            self._cache, layer, ffi.from_buffer("int32_t[]", ids),
            ffi.NULL if weights is None else ffi.from_buffer("float[]", weights),
            ids.shape[1], ids.shape[0], slot_ids, self._loads,
        )  # fmt: skip
        if self._own is not None:
            self._own.check()
        if n == self.lib.c.ROTARY_ERR_ARG:
            raise RotaryError(
                f"layer {layer}: {len(ids)} tokens want more experts than {self.n_slots[layer]} slots "
                "hold, or experts that do not exist; replay fewer tokens at a time"
            )
        return [(load.expert, load.slot, load.evicted) for load in self._loads[0 : self.lib.check(n)]]

    def replay(self, layers: Any, ids: Any, weights: Any = None) -> Any:
        """Look up int32 rows `ids` [n, n_used], -1 for none, of `layers` [n] in turn; return misses [n]."""
        ffi = self.lib.ffi
        misses = ffi.new("int32_t[]", len(ids))
        status = self.lib.c.rotary_cache_replay(
            self._cache, len(ids), ffi.from_buffer("int32_t[]", layers), ffi.from_buffer("int32_t[]", ids),
            ffi.NULL if weights is None else ffi.from_buffer("float[]", weights), ids.shape[1], misses,
        )  # fmt: skip
        if self._own is not None:
            self._own.check()
        if status == self.lib.c.ROTARY_ERR_ARG:
            raise RotaryError(
                "trace: a row wants more experts than slots hold, or experts that do not exist; "
                f"there are {min(self.n_slots)} slots; replay it with more"
            )
        self.lib.check(status)
        return ffi.unpack(misses, len(ids))

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether an expert is resident."""
        return bool(self.lib.c.rotary_slots_slot_of(self._slots[layer], expert) >= 0)

    def reserve(self, layer: int, expert: int, keep: list[int]) -> bool:
        """Reserve a slot for an expert in flight, evicting one not in `keep`; False if no slot can be had."""
        return bool(self.lib.c.rotary_slots_reserve(self._slots[layer], expert, keep, len(keep)) >= 0)

    def end_reservation(self, layer: int, expert: int, resident: bool) -> None:
        """Commit an expert that was in flight as resident, or give it up."""
        self.lib.check(self.lib.c.rotary_slots_end_reservation(self._slots[layer], expert, resident))

    def slots(self) -> list[int]:
        """Number of slots of each layer now."""
        return [self.lib.c.rotary_slots_n_slots(slots) for slots in self._slots]


class NativePredictor(PrefetchPolicy):
    """A predictor of the native library, by name; `rotary_llamacpp.predictors` has the same in Python."""

    def __init__(self, lib: Library, predictor: str, n_layers: int, n_expert: int, n_used: int) -> None:
        super().__init__(n_layers, n_expert, n_used)
        self.lib = lib
        pointer = lib.c.rotary_foresight_new(predictor.encode(), lib.ffi.NULL, n_layers, n_expert)
        if not pointer:
            lib.check(lib.c.rotary_last_status())
        self._predictor = lib.ffi.gc(pointer, lib.c.rotary_foresight_free)
        self._experts = lib.ffi.new("int32_t[]", n_expert)

    def note(self, layer: int, ids: Routing) -> None:
        flat = [expert for row in ids for expert in row]
        self.lib.c.rotary_foresight_note(self._predictor, layer, flat, len(ids[0]), len(ids))

    def learn(self, profile: Profile) -> None:
        ffi = self.lib.ffi
        for layer in range(self.n_layers):
            pairs = np.ascontiguousarray(profile.pairs[layer - 1], np.float32) if layer else None
            before = np.ascontiguousarray(profile.popularity[layer - 1], np.float32) if layer else None
            self.lib.c.rotary_foresight_learn(
                self._predictor, layer, ffi.from_buffer("float[]", profile.popularity[layer]),
                ffi.NULL if pairs is None else ffi.from_buffer("float[]", pairs),
                ffi.NULL if before is None else ffi.from_buffer("float[]", before), profile.n_tokens,
            )  # fmt: skip

    def name(self, layer: int, ahead: int, n: int) -> list[int]:
        n_named = self.lib.c.rotary_foresight_name(
            self._predictor, layer, ahead, self._experts, min(n, self.n_expert)
        )
        return self.lib.ffi.unpack(self._experts, n_named) if n_named else []
