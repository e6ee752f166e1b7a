# SPDX-License-Identifier: MIT
"""Renders a plan of ``rotary plan`` as text and as a figure."""

from __future__ import annotations

from ..errors import RotaryError
from ..host.files import writing
from ..planning.options import Option, at_budgets
from ..planning.plan import Plan
from ..planning.roofline import Case, Cost
from ..units import GIB, percent, size, span
from .drawing import axes, headline, label_lines, styled, svg
from .tables import columns

_PLOTTED = (0.05, 0.0625, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORDS = {"vram": "VRAM", "ram": "memory", "vram rate": "VRAM read", "ram rate": "weights read by CPU"}


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
            f"; {size(full)} if layers with a window keep all"
            if (full := found.kv_bytes(n_ctx, windows=False)) != found.kv_bytes(n_ctx)
            else ""
        ),
        *(
            [f"  context       {n_ctx} tokens are asked for; the model was trained for {found.n_ctx_train}"]
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
    lines += columns(rows, left=("", "limit"))
    for option in plan.options:
        if option.problem:
            lines.append(f"{option.name}: cannot run here, {option.problem}")
    lines += [_slots(option) for option in plan.options if option.is_rotary and option.n_slots]
    if found.layers:
        lines.append(f"hit rates from {case.hits.source}")
    lines += ["", plan.why]
    if plan.best is not None:
        lines.append(f"  {plan.best.command}")
    if case.machine.vram_bytes:
        lines += ["", "the GPU's rates are those above; no plan for a GPU has been compared with a run yet"]
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


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million"


def _operations(rate: float) -> str:
    return f"{rate / 1e12:.1f} Tflop/s" if rate >= 1e12 else f"{rate / 1e9:.0f} Gflop/s"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"


def write_plot(plan: Plan, output: str) -> None:
    """Write an SVG of decode speed against Rotary's budget, with stock's options as horizontal lines.

    Raises
    ------
    RotaryError
        The file's name does not end in .svg, the model has no experts, no budget can run, or matplotlib is
        not installed.
    """
    if not output.lower().endswith(".svg"):
        raise RotaryError(f"{output}: figures are written as SVG only; give a name that ends in .svg")
    points = at_budgets(plan.case, _PLOTTED) if plan.case.print.layers else []
    if not points:
        raise RotaryError(f"{output}: no budget can run here, so there is nothing to plot; see the plan")
    case = plan.case
    budgets = [(option.budget_bytes or 0) / GIB for _, option in points]
    rates = [option.decode.rate for _, option in points if option.decode]
    place = "VRAM" if case.machine.vram_bytes else "memory"
    with styled():
        drawn = axes(
            xlabel=f"{place} for experts, GiB (all of them are {case.print.expert_bytes / GIB:.1f} GiB)",
            ylabel="decode, tokens per second",
        )
        headline(drawn.get_figure(), f"{case.print.name}: expected speed by budget", [_machine_line(case)])
        drawn.plot(budgets, rates, marker="o", clip_on=False, label=points[0][1].name)
        for rate, names in _levels(plan).items():
            drawn.plot([0, max(budgets)], [rate, rate], label="\n".join(names))
        drawn.set_xlim(0, max(budgets))
        drawn.set_ylim(0, 1.05 * drawn.get_ylim()[1])
        label_lines(drawn)
        figure = svg(drawn)
    with writing(output) as file:
        file.write(figure.encode())


def _levels(plan: Plan) -> dict[float, list[str]]:
    """Speeds of stock's options and their names; options whose lines would lie on each other share one."""
    levels: dict[float, list[str]] = {}
    for option in plan.options:
        if option.decode is not None and not option.is_rotary:
            rate = option.decode.rate
            near = next((known for known in levels if abs(known - rate) < 0.01 * rate), rate)
            levels.setdefault(near, []).append(f"stock: {option.name}")
    return levels


def _machine_line(case: Case) -> str:
    machine = case.machine
    parts = [f"{size(machine.ram_bytes)} of memory", f"disk {_rate(machine.disk_rate)}"]
    if machine.vram_bytes:
        parts = [f"{size(machine.vram_bytes)} of VRAM", f"link {_rate(machine.link_rate)}", *parts]
    return f"{', '.join(parts)}; context of {case.request.n_ctx} tokens; hit rates by {case.hits.source}"
