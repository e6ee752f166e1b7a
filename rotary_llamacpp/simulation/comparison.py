# SPDX-License-Identifier: MIT
"""Compares replays of one trace under policies, budgets and predictors, for ``rotary simulate``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import RotaryError
from ..policies import NATIVE
from ..predictors import NAMES, PrefetchPolicy
from ..traces.archive import Trace, load
from ..traces.profiles import Profile
from ..traces.profiles import load as load_profile
from ..units import parse_rate
from .replays import Link, belady, predictor, replay, slots_for


def compare(
    trace_file: str,
    policies: Iterable[str],
    budgets: Sequence[float],
    *,
    link: str | None = None,
    compute_us: float = 3000.0,
    latency_us: float = 0.0,
    predictors: Iterable[str] = ("none",),
    profile: str | None = None,
    depth: int = 1,
    adaptive: bool = False,
) -> list[dict[str, Any]]:
    """Replay a trace; return a row for each budget, policy and predictor, and one for Belady's optimum.

    Raises
    ------
    RotaryError
        A name is unknown, or a file cannot be read.
    """
    policies, predictors = list(policies), list(predictors)
    check_names("policy", policies, NATIVE)
    check_names("predictor", predictors, ("none", *NAMES))
    if link is None and predictors != ["none"]:
        raise RotaryError("predictors: nothing is prefetched without a link; give --link, such as pcie4x16")
    medium = Link(parse_rate(link), compute_us, latency_us) if link is not None else None
    trace = load(trace_file)
    known = load_profile(profile) if profile is not None else None
    if known is not None and (known.layers, known.n_expert) != (trace.layers, trace.n_expert):
        raise RotaryError(
            f"{profile}: {len(known.layers)} layers of {known.n_expert} experts, the trace has "
            f"{len(trace.layers)} of {trace.n_expert}; make a profile of the same model"
        )
    return compare_trace(trace, policies, budgets, medium, predictors, depth, known, adaptive)


def compare_trace(
    trace: Trace,
    policies: Sequence[str],
    budgets: Sequence[float],
    link: Link | None,
    predictors: Sequence[str] = ("none",),
    depth: int = 1,
    profile: Profile | None = None,
    adaptive: bool = False,
) -> list[dict[str, Any]]:
    """Replay a trace that is loaded already, with names that are checked; see `compare`."""
    rows: list[dict[str, Any]] = []
    for share in budgets:
        n_slots = slots_for(trace, share)
        for policy in policies:
            for name in predictors:
                chosen = _predictor(trace, name, profile)
                found = replay(trace, policy, n_slots, link, chosen, depth, adaptive)
                rows.append(
                    {
                        "budget": share, "n_slots": n_slots[0], "policy": policy, "predictor": name,
                        "hit_rate": found.hit_rate, "byte_hit_rate": found.byte_hit_rate,
                        "misses": found.misses, "tokens_per_second": found.tokens_per_second,
                        "stall_us": found.stall_us / found.tokens if link and found.tokens else None,
                        "prefetched": found.prefetched, "prefetch_used": found.prefetch_used,
                        "late_hits": found.late_hits,
                    }
                )  # fmt: skip
        best = belady(trace, n_slots)
        rows.append(
            {"budget": share, "n_slots": n_slots[0], "policy": "belady", "predictor": "none",
             "hit_rate": best.hit_rate, "byte_hit_rate": best.byte_hit_rate, "misses": best.misses}
        )  # fmt: skip
    return rows


def _predictor(trace: Trace, name: str, profile: Profile | None) -> PrefetchPolicy | None:
    if name == "none":
        return None
    made = predictor(trace, name)
    if profile is not None:
        made.learn(profile)
    return made


def check_names(kind: str, names: Iterable[str], accepted: Sequence[str]) -> None:
    """Raise RotaryError at the first name that is not known."""
    for name in names:
        if name not in accepted:
            raise RotaryError(f"{kind} {name!r}: not known; choose one of {', '.join(accepted)}")
