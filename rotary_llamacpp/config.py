# SPDX-License-Identifier: MIT
"""Options of paging, checked before anything is loaded. Pure logic: imports neither ggml nor llama_cpp."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

from .errors import BudgetError, RotaryError
from .policies import AUTO, NATIVE, Factory
from .predictors import NAMES as PREDICTORS
from .predictors import Factory as PredictorFactory
from .units import MIB, UNITS, number_and_unit, parse_bytes, shown, whole_bytes

STORES = ("auto", "mmap", "direct")
PINS = ("auto", "on", "off")
SPLITS = ("adaptive", "even")

_ACCEPTED = "give auto, min, a share (25% or 0.25), a size (8GiB), bytes or slots per layer (16 slots)"
_MAX_SLOTS = 2**31 - 1


@dataclass(frozen=True)
class Budget:
    """A budget; the native library parses `text`: "auto", "min", "25%", "<bytes>" or "16 slots"."""

    kind: str  # "auto", "min", "share", "slots" or "bytes"
    amount: float = 0  # percent, slots per layer or bytes
    text: str = ""

    @classmethod
    def parse(cls, value: str | int | float) -> Budget:
        """Read a budget.

        Raises
        ------
        BudgetError
            The value has none of the accepted forms.
        """
        refusal = BudgetError(f"budget {shown(value)}: not understood; {_ACCEPTED}")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise refusal
        if isinstance(value, float):
            return cls._share_of_one(value, refusal)
        if isinstance(value, str) and (text := value.strip().lower()) in ("auto", "min"):
            return cls(text, 0, text)
        number, unit = number_and_unit(value)
        if not number or float(number) == 0:
            raise refusal
        amount = float(number)
        if unit == "%":
            if amount > 100:
                raise BudgetError(f"budget {shown(value)}: more than all experts; give at most 100%")
            return cls.share(amount)
        if unit == "" and "." in number:
            return cls._share_of_one(amount, refusal)
        if unit.startswith("slot"):
            if amount > _MAX_SLOTS or amount != int(amount):
                raise refusal
            return cls("slots", int(amount), f"{int(amount)} slots")
        n_bytes = whole_bytes(number, unit) if unit in UNITS else None
        if n_bytes is None:
            raise refusal
        return cls("bytes", n_bytes, str(n_bytes))

    @classmethod
    def _share_of_one(cls, value: float, refusal: BudgetError) -> Budget:
        if 0 < value <= 1:
            return cls.share(100 * value)
        if 1 < value < MIB:
            percent = f"{value:g}% or " if value <= 100 else ""
            raise BudgetError(
                f"budget {value!r}: a number with a point is a share of the experts, above 0 and at most 1; "
                f"write {percent}{value:g}GiB"
            )
        raise refusal

    @classmethod
    def share(cls, percent: float) -> Budget:
        """A budget of `percent` of the experts."""
        return cls("share", percent, f"{Decimal(f'{percent:.10g}'):f}%")  # the library reads no exponent


@dataclass(frozen=True)
class RotaryConfig:
    """How to page one model.

    Parameters
    ----------
    budget : str, int or float
        Memory for resident experts on the inner device: ``"auto"`` (from its free memory), ``"min"`` (one
        token's experts), a share (``"25%"``, ``"0.25"`` or ``0.25``), a size (``"8GiB"``), an int of bytes,
        or ``"16 slots"`` per layer.
    inner : str, optional
        ggml device that computes, ``"CPU"``, ``"CUDA0"`` or ``"rpc://host:port"``, or several, separated by
        commas, over which llama.cpp splits the layers; by default all GPUs, else the CPU. A budget in bytes
        is for all of them together.
    repack : bool
        On the CPU, repack weights for its kernels as stock llama.cpp does; False is as stock with
        ``use_extra_bufts=False``.
    direct : bool
        Let a host inner device compute straight from the mapped file if a batch wants more experts than
        there are slots.
    margin : int or str, optional
        Bytes of the inner device's memory that ``"auto"`` leaves free.
    store : str
        Where absent experts come from: ``"mmap"``, the mapped file through the page cache; ``"direct"``,
        reads past the page cache, many at a time; ``"auto"``, direct where the experts do not fit into the
        available memory.
    prefetch : bool, str or class
        With the direct store, read the experts that the next layers will probably want while the disk is
        idle; on a GPU, copy them while the link is idle. True or ``"auto"`` predicts with the next layers'
        routers, or with ``"mixed"`` where those cannot be applied early. A name is one of
        `rotary_llamacpp.predictors.NAMES`; a class is like those in `rotary_llamacpp.predictors`, called in
        Python and slower. A GPU that resolves lookups itself always uses the routers. False is off.
    staging : int or str, optional
        Bytes of memory for reads in flight, with the direct store.
    pin : str
        Whether to pin experts in host memory, where a GPU can read them: ``"auto"``, if they take at most
        three quarters of the available memory; ``"on"``; ``"off"``. Experts that are not pinned are copied by
        the host.
    policy : str or class
        Which expert to evict when a slot is needed: a name of `rotary_llamacpp.policies.NATIVE`; ``"auto"``,
        the best policy that can run where lookups are resolved; or a class such as those in
        `rotary_llamacpp.policies`, called in Python and slower.
    split : str
        How slots are divided between layers: ``"adaptive"`` begins evenly, then, on the CPU, moves one
        slot at a time to where it saves more misses; ``"even"`` stays even.
    profile : str
        Which experts fill the slots at first: ``"auto"``, those of the profile that ``rotary profile`` wrote
        beside the model or ``rotary convert`` stored in it, if there is one; a path, those of the profile
        there; ``"off"``, none.
    verbose : bool, optional
        Log what was chosen in one line on the logger ``rotary_llamacpp``; by default if ``Llama`` is verbose.
        Warnings are always logged.
    """

    budget: str | int | float = "auto"
    inner: str | None = None
    repack: bool = True
    direct: bool = True
    margin: int | str | None = None
    store: str = "auto"
    prefetch: bool | str | PredictorFactory = True
    staging: int | str | None = None
    pin: str = "auto"
    policy: str | Factory = AUTO
    split: str = "adaptive"
    profile: str = "auto"
    verbose: bool | None = None

    def __post_init__(self) -> None:
        self.parsed_budget  # noqa: B018 (refuses what is not a budget)
        for size in (self.margin, self.staging):
            if size is not None:
                parse_bytes(size)
        if self.store not in STORES:
            raise RotaryError(f"store {self.store!r}: not known; give one of {', '.join(STORES)}")
        if self.pin not in PINS:
            raise RotaryError(f"pin {self.pin!r}: not known; give one of {', '.join(PINS)}")
        if not isinstance(self.profile, str) or not self.profile:
            raise RotaryError(
                f"profile {self.profile!r}: not a path; give auto, off or the path of a profile"
            )
        if not callable(self.policy) and self.policy not in (AUTO, *NATIVE):
            raise RotaryError(
                f"policy {self.policy!r}: not known; give one of {', '.join((AUTO, *NATIVE))} or a class"
            )
        if not callable(self.prefetch) and self.prefetch not in (True, False, AUTO, *PREDICTORS):
            raise RotaryError(
                f"prefetch {self.prefetch!r}: not known; give one of True, False, "
                f"{', '.join((AUTO, *PREDICTORS))} or a class"
            )
        if self.split not in SPLITS:
            raise RotaryError(f"split {self.split!r}: not known; give one of {', '.join(SPLITS)}")
        if self.inner is not None and not (isinstance(self.inner, str) and self.inner.strip()):
            raise RotaryError(
                f"inner {self.inner!r}: not a device name; use a name such as CPU or CUDA0; "
                "see `rotary doctor` for the names"
            )

    @functools.cached_property
    def parsed_budget(self) -> Budget:
        """The budget as the native library takes it."""
        return Budget.parse(self.budget)

    @property
    def margin_bytes(self) -> int:
        """The margin in bytes, 0 for the native library's default."""
        return 0 if self.margin is None else parse_bytes(self.margin)

    @property
    def staging_bytes(self) -> int:
        """Bytes of memory for reads in flight, 0 for the native library's default."""
        return 0 if self.staging is None else parse_bytes(self.staging)

    @classmethod
    def from_any(
        cls, value: RotaryConfig | Mapping[str, Any] | str | int | float | None
    ) -> RotaryConfig | None:
        """Make a configuration from the ``rotary`` argument of ``Llama``; None if it turns paging off.

        Raises
        ------
        RotaryError
            An option is unknown, or a value is out of range.
        """
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            unknown = sorted(set(value) - set(known))
            if unknown:
                raise RotaryError(
                    f"rotary: unknown option {', '.join(map(repr, unknown))}; options are {', '.join(known)}"
                )
            value = dict(value)
            return None if _is_off(value.get("budget", "auto")) else cls(**value)
        if isinstance(value, cls):
            return value
        if value is True:
            return cls()
        return None if _is_off(value) else cls(budget=value)  # type: ignore[arg-type]


def _is_off(budget: object) -> bool:
    if isinstance(budget, str):
        number, unit = number_and_unit(budget)
        known = unit in UNITS or unit == "%" or unit.startswith("slot")
        return budget.strip().lower() in ("off", "none") or (known and bool(number) and float(number) == 0)
    return budget is None or budget is False or (isinstance(budget, (int, float)) and budget == 0)
