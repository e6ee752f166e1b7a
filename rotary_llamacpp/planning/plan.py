# SPDX-License-Identifier: MIT
"""Makes the plan of ``rotary plan`` from a header or a named shape, and a machine."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import RotaryConfig
from ..errors import RotaryError
from ..gguf_files.info import read_shards
from ..host.machine import cpu_count
from ..traces import archive as traces
from ..traces import profiles
from . import calibration, footprint, hits, shapes
from .options import Option, options, recommend
from .roofline import Case, Request


@dataclass(frozen=True)
class Plan:
    """A case, all options, and the best one."""

    case: Case
    options: list[Option]
    best: Option | None
    why: str


def make(
    model: str, *, type_name: str | None = None, vram: str | None = None, ram: str | None = None,
    link: str = "auto", disk: str = "auto", ram_rate: str | None = None, vram_rate: str | None = None,
    n_ctx: int | None = None, prompt: int | None = None, answer: int | None = None, budget: str = "auto",
    store: str = "auto", trace: str | None = None, profile: str = "auto", measure: bool = False,
    threads: int | None = None,
) -> Plan:  # fmt: skip
    """Plan a model: a file, or a named shape.

    Parameters
    ----------
    vram, ram, link, disk, ram_rate, vram_rate, budget, store : str
        Sizes for `rotary_llamacpp.units.parse_size`, rates for `rotary_llamacpp.units.parse_rate`, budget
        and store as in `rotary_llamacpp.RotaryConfig`.
    trace, profile : str
        Files to expect hit rates from; ``"auto"`` is the profile beside the model or in it, ``"off"`` none.
    measure : bool
        Calibrate on this machine, with `threads`, by default one for each CPU that may be used.

    Raises
    ------
    RotaryError
        An argument is unknown, not readable or not understood.
    """
    RotaryConfig(budget, store=store)  # refuses invalid values
    if trace is not None and profile not in ("auto", "off"):
        raise RotaryError(f"{trace}: a trace and a profile, {profile}, are given; leave one out")
    is_file = Path(model).is_file() or model.endswith(".gguf") or os.sep in model
    if is_file and type_name is not None:
        raise RotaryError(f"{model}: --type is for named shapes only; leave it out")
    headers = read_shards(model) if is_file else [shapes.header(model, type_name)]
    found = footprint.of_headers(headers)
    machine = calibration.describe(
        vram=vram, ram=ram, link=link, disk=disk, ram_rate=ram_rate, vram_rate=vram_rate
    )
    request = _request(n_ctx or min(4096, found.n_ctx_train or 4096), prompt, answer)
    threads = threads or (cpu_count() if measure else None)
    if measure and threads:
        named = {"link": link, "disk": disk, "ram rate": ram_rate, "vram rate": vram_rate}
        given = frozenset(name for name, text in named.items() if text not in (None, "auto"))
        path = Path(model) if is_file else None
        machine = calibration.measure(machine, found, request, path, threads, given)
    path_in_commands = model if is_file else headers[0].path.name
    case = Case(
        path_in_commands, found, machine, request, _hits(found, model, is_file, trace, profile), budget,
        store, threads,
    )  # fmt: skip
    every = options(case)
    best, why = recommend(case, every)
    return Plan(case, every, best, why)


def _request(n_ctx: int, prompt: int | None, answer: int | None) -> Request:
    """Make a request; by default a prompt of 512 and an answer of 128 tokens, less in a small context."""
    request = Request(
        n_ctx,
        prompt or max(1, min(512, n_ctx // 2, n_ctx - (answer or 0))),
        answer or max(1, min(128, n_ctx // 4, n_ctx - (prompt or 0))),
    )
    if request.prompt + request.answer > n_ctx:
        raise RotaryError(
            f"context: {n_ctx} tokens; a prompt of {request.prompt} and an answer of {request.answer} do not "
            "fit; raise --ctx or lower --prompt and --answer"
        )
    return request


def _hits(
    found: footprint.Footprint, model: str, is_file: bool, trace: str | None, profile: str
) -> hits.Hits:
    if trace is not None:
        return hits.of_trace(traces.load(trace), found.layers, trace)
    if profile not in ("auto", "off"):
        return hits.of_profile(profiles.load(profile), found.layers, Path(profile).name)
    if profile == "auto" and is_file:
        if (path := profiles.beside(model)).is_file():
            return hits.of_profile(profiles.load(path), found.layers, path.name)
        if (inside := profiles.stored(model)) is not None:
            return hits.of_profile(inside, found.layers, f"the profile in {Path(model).name}")
    return hits.default(found.layers)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Convert a plan to plain dicts, lists, strings and numbers, for JSON."""
    case, found = plan.case, plan.case.print
    sizes = asdict(found)
    for left_out in ("layers", "cached", "matrices", "dense", "heads"):
        del sizes[left_out]
    return {
        "model": {
            **sizes,
            "n_expert_layers": len(found.layers),
            "expert_bytes": found.expert_bytes,
            "chosen_bytes": found.chosen_bytes,
            "kv_bytes": found.kv_bytes(case.request.n_ctx),
        },
        "machine": asdict(case.machine),
        "request": asdict(case.request),
        "hit_rate_source": case.hits.source,
        "options": [_option(option) for option in plan.options],
        "recommendation": {
            "option": plan.best.key if plan.best else None,
            "uses_rotary": bool(plan.best and plan.best.is_rotary),
            "command": plan.best.command if plan.best else None,
            "why": plan.why,
        },
    }


def _option(option: Option) -> dict[str, Any]:
    plain = {key: value for key, value in vars(option).items() if key not in ("decode", "prefill", "n_slots")}
    for name, cost in (("decode", option.decode), ("prefill", option.prefill)):
        plain[f"{name}_tokens_per_second"] = cost.rate if cost else None
        plain[f"{name}_limit"] = cost.limit if cost else None
        plain[f"{name}_seconds"] = cost.parts if cost else None
    return {**plain, "n_slots": list(option.n_slots)}
