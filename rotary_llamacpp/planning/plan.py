# SPDX-License-Identifier: MIT
"""Makes the plan of ``rotary plan`` from a header or a named shape and a machine, and renders it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import RotaryConfig
from ..display.drawing import standalone
from ..errors import RotaryError
from ..gguf_files.info import read_shards
from ..host.files import writing
from ..host.machine import cpu_count
from ..traces import archive as traces
from ..traces import profiles
from ..units import GIB, percent, size, span
from . import calibration, footprint, hits, shapes
from .options import Option, at_budgets, options, recommend
from .roofline import Case, Cost, Request

_PLOTTED = (0.05, 0.0625, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORDS = {"vram": "VRAM", "ram": "memory", "vram rate": "VRAM read", "ram rate": "weights read by CPU"}


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
        Sizes as `rotary_llamacpp.units.parse_size`, rates as `rotary_llamacpp.units.parse_rate`, the
        budget and the store as of `rotary_llamacpp.RotaryConfig`.
    trace, profile : str
        Files to expect hit rates by; ``"auto"`` is the profile beside the model or in it, ``"off"`` is none.
    measure : bool
        Calibrate on this machine, with `threads`, by default one for each CPU that may be used.

    Raises
    ------
    RotaryError
        An argument is unknown, not readable or not understood.
    """
    RotaryConfig(budget, store=store)  # refuses what is none
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


# ---- as text


def describe(plan: Plan) -> str:
    """Render a plan as lines of text."""
    case, found = plan.case, plan.case.print
    n_ctx = case.request.n_ctx
    lines = [
        f"{found.name}: {found.architecture}, {found.n_layer} layers, {_count(found.n_params)} weights "
        f"in {size(found.weight_bytes)}",
        f"  experts       {size(found.expert_bytes)}, can be paged"
        + (f"; one token chooses {size(found.chosen_bytes)}" if found.layers else ""),
        f"  other weights {size(found.resident_bytes)}, stay resident",
        f"  KV cache      {size(found.kv_bytes(n_ctx))} for {n_ctx} tokens in f16"
        + (
            f"; {size(full)} where windows are not used"
            if (full := found.kv_bytes(n_ctx, windows=False)) != found.kv_bytes(n_ctx)
            else ""
        ),
        *(
            [f"  context       {n_ctx} tokens are asked for; it was trained for {found.n_ctx_train}"]
            if 0 < found.n_ctx_train < n_ctx
            else []
        ),
        "",
        *_machine(case),
        "",
    ]
    rows = [["", "decode tok/s", "limit", "prompt tok/s", "limit", "VRAM", "memory"]]
    for option in plan.options:
        rows.append(
            [
                option.name,
                *_speed(option.decode),
                *_speed(option.prefill),
                size(option.vram_bytes),
                size(option.ram_bytes),
            ]
        )
    lines += _columns(rows)
    for option in plan.options:
        if option.problem:
            lines.append(f"{option.name}: not here, {option.problem}")
    lines += [_slots(option) for option in plan.options if option.is_rotary and option.n_slots]
    if found.layers:
        lines.append(f"hit rates by {case.hits.source}")
    lines += ["", plan.why]
    if plan.best is not None:
        lines.append(f"  {plan.best.command}")
    if case.machine.vram_bytes:
        lines += ["", "rates of a GPU are those above; no plan for a GPU has been compared with a run yet"]
    return "\n".join(lines)


def _machine(case: Case) -> list[str]:
    machine, sources = case.machine, case.machine.sources or {}
    values = {
        "vram": size(machine.vram_bytes),
        "ram": size(machine.ram_bytes),
        "vram rate": _rate(machine.vram_rate),
        "link": _rate(machine.link_rate),
        "ram rate": _rate(machine.ram_rate),
        "disk": _rate(machine.disk_rate),
        "gpu compute": _operations(machine.gpu_flops),
        "cpu compute": _operations(machine.cpu_flops),
        "gpu layer": f"{1e6 * machine.gpu_layer_s:.0f} us",
        "cpu layer": f"{1e6 * machine.cpu_layer_s:.0f} us",
        "sync": f"{1e6 * machine.sync_s:.0f} us",
    }
    if not machine.vram_bytes:
        for name in ("vram rate", "link", "gpu compute", "gpu layer", "sync"):
            del values[name]
    return [f"{_WORDS.get(name, name):<20} {value:>14}  {sources[name]}" for name, value in values.items()]


def _slots(option: Option) -> str:
    return (
        f"{option.name}: {span(option.n_slots)} slots per layer in {size(option.budget_bytes or 0)}, store "
        f"{option.store}; {percent(option.hit_rate)} hits expected, {percent(option.uniform_hit_rate)} "
        "if routing had no locality"
    )


def _speed(cost: Cost | None) -> tuple[str, str]:
    return ("-", "") if cost is None else (f"{cost.rate:.1f}", cost.limit)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for i, cell in enumerate(row[1:], start=1):
            cells.append(cell.ljust(widths[i]) if rows[0][i] == "limit" else cell.rjust(widths[i]))
        lines.append("  ".join(cells).rstrip())
    return lines


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million"


def _operations(rate: float) -> str:
    return f"{rate / 1e12:.1f} Tflop/s" if rate >= 1e12 else f"{rate / 1e9:.0f} Gflop/s"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"


# ---- as data


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


# ---- as a figure


def write_plot(plan: Plan, output: str) -> None:
    """Write an SVG of decode in tokens per second against Rotary's budget, stock's options as level lines.

    Raises
    ------
    RotaryError
        The file's name does not end in .svg, or the model has no experts, or no budget can run.
    """
    if not output.lower().endswith(".svg"):
        raise RotaryError(f"{output}: figures are written as SVG only; name the file .svg")
    points = at_budgets(plan.case, _PLOTTED) if plan.case.print.layers else []
    if not points:
        raise RotaryError(f"{output}: no budget of Rotary's can run here, nothing to plot; see the plan")
    reach = [option.budget_bytes or 0 for _, option in points]
    lines = {
        points[0][1].name: [
            ((option.budget_bytes or 0) / GIB, option.decode.rate) for _, option in points if option.decode
        ]
    }
    for option in plan.options:
        if option.decode is not None and not option.is_rotary:
            lines[option.name] = [(end / GIB, option.decode.rate) for end in (min(reach), max(reach))]
    figure = standalone(lines, f"{plan.case.print.name}: decode tok/s by budget", "GiB for experts")
    with writing(output) as file:
        file.write(figure.encode())
