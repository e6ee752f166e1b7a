# SPDX-License-Identifier: MIT
"""Draws what beyond_ram.py wrote with --json: decode over memory, stock at its best and Rotary, as SVG.

One panel for each type of weights and disk. Nothing is measured here, and all that the figure says comes from
the file, so that the same file makes the same bytes.

    python benchmarks/plots.py figures.json -o docs/benchmarks/beyond-ram.svg
    python benchmarks/plots.py figures.json -o docs/benchmarks/random.svg --routing random --disks fast,slow
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it finds only its own folder

from benchmarks import report
from rotary_llamacpp.display.drawing import INK, LINES, MUTED, figure, headline, label_lines, styled, svg
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.host.files import writing
from rotary_llamacpp.units import GIB

SYSTEMS = (("stock", LINES[1][0], -1), ("rotary", LINES[0][0], 1))  # colour; numbers below or above lines
NAMES = {"stock": "stock's best", "rotary": "Rotary"}


@dataclass(frozen=True)
class Panel:
    """Decode of one type of weights on one disk.

    Parameters
    ----------
    model_bytes : int
        Size of the model's file.
    lines : dict
        By system, points of memory in bytes and tokens per second, None where no run ended; by memory.
    in_memory : dict
        By system, tokens per second with the model in the page cache; None if that was not measured.
    """

    type: str
    disk: str
    model_bytes: int
    lines: dict[str, list[tuple[float, float | None]]]
    in_memory: dict[str, float | None]


def panels(everything: dict, routing: str, types: list[str], disks: list[str]) -> list[Panel]:
    """The panels that there are figures for, of these types and disks or, where none is named, of all."""
    rows = [
        row
        for row in everything["rows"]
        if row["routing"] == routing
        and row["memory"] is not None
        and row["type"] in (types or [row["type"]])
        and row["disk"] in (disks or [row["disk"]])
    ]
    found = []
    for type_, disk in dict.fromkeys((row["type"], row["disk"]) for row in rows):
        here = sorted(
            (row for row in rows if (row["type"], row["disk"]) == (type_, disk)), key=lambda r: r["memory"]
        )
        kind = here[0]["kind"]
        model_bytes = everything["models"][f"{type_} {kind}"]
        in_memory = report.select(everything["runs"], type=type_, kind=kind, memory=None, prefetch=True)
        lines, references = {}, {}
        for system, _, _ in SYSTEMS:
            lines[system] = [(row["memory"] * model_bytes, row[f"decode_{system}"]) for row in here]
            references[system] = report.best(report.select(in_memory, system=system), report.decode(routing))[
                1
            ]
        found.append(Panel(type_, disk, model_bytes, lines, references))
    return found


# ---- text


def about(everything: dict, drawn: list[Panel], routing: str) -> str:
    """What was measured, on what, how and when."""
    machine, settings = everything["machine"], everything["settings"]
    sizes = {each.type: each.model_bytes for each in drawn}
    models = []
    for type_, n_bytes in sizes.items():
        shape = everything["shapes"][type_]
        models.append(
            f"{type_.upper()}, {shape['n_layer']} layers, {n_bytes / GIB:.2f} GiB, "
            f"{shape['n_expert_used']} of {shape['n_expert']} experts used"
        )
    quick = "A smoke run, whose figures mean nothing. " if settings["quick"] else ""
    commit = f"commit {everything['commit']}, " if everything["commit"] else ""
    n_threads = machine["n_threads"]
    return (
        f"{quick}Models: {'; '.join(models)}. Routing: {routing}. {machine['cpu']}, {n_threads} "
        f"thread{'s' if n_threads > 1 else ''}, {machine['memory_bytes'] / GIB:.0f} GiB, Linux "
        f"{machine['kernel'].split('-')[0]}. Stock: llama-cpp-python {everything['llama_cpp_python']} with "
        f"the best read-ahead and layout at each point. {settings['n_decode']} tokens decoded after a prompt "
        f"of {settings['n_prompt']}, medians; {commit}{everything['date']}."
    )


def rate(value: float) -> str:
    """Tokens per second, as the tables have them."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def reference_text(panel: Panel) -> str:
    """The speeds in memory, in words."""
    known = [f"{NAMES[s]} {rate(value)}" for s, value in panel.in_memory.items() if value is not None]
    return f"in memory: {', '.join(known)}"


# ---- the figure


def draw(everything: dict, routing: str, types: list[str], disks: list[str]) -> str:
    """The figure as SVG.

    Raises
    ------
    RotaryError
        There are no such figures, or matplotlib is not installed.
    """
    drawn = panels(everything, routing, types, disks)
    if not drawn:
        raise RotaryError(
            f"no figures of routing {routing!r} in less memory than the model's, types "
            f"{', '.join(types) or 'any'}, disks {', '.join(disks) or 'any'}; choose among those measured"
        )
    columns = list(dict.fromkeys(panel.type for panel in drawn))
    lines = list(dict.fromkeys(panel.disk for panel in drawn))
    rates = [y for panel in drawn for points in panel.lines.values() for _, y in points]
    rates += [y for panel in drawn for y in panel.in_memory.values()]
    top = 1.1 * max((y for y in rates if y is not None), default=1.0)
    with styled():
        whole = figure(8.0, 1.2 + 2.4 * len(lines))
        headline(whole, "Decode in less memory than the model takes", [about(everything, drawn, routing)])
        grid = whole.subplots(len(lines), len(columns), sharex="col", sharey=True, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel in drawn:
            axes = grid[lines.index(panel.disk)][columns.index(panel.type)]
            draw_panel(axes, panel, everything["disks"][panel.disk]["bandwidth"], top)
            limits = {x for each in drawn if each.type == panel.type for x, _ in each.lines["stock"]}
            ticks = [(x / GIB, f"{x / GIB:.3g}\n{x / panel.model_bytes:.0%}") for x in sorted(limits)]
            ticks.append((panel.model_bytes / GIB, f"{panel.model_bytes / GIB:.3g}\nmodel"))
            axes.set_xticks(*zip(*ticks, strict=True))  # of all panels that share the scale
        return svg(grid[0][0])


def draw_panel(axes: Any, panel: Panel, bandwidth: float, top: float) -> None:
    """Lines, their points' numbers, and the speed in memory as a level line."""
    axes.set_visible(True)
    axes.set_title(f"{panel.type.upper()}, {panel.disk} disk of {bandwidth / GIB:.2g} GiB/s")
    axes.set_xlim(0, 1.06 * panel.model_bytes / GIB)
    axes.set_ylim(0, top)
    for system, colour, side in SYSTEMS:
        points = [(x / GIB, y) for x, y in panel.lines[system] if y is not None]
        if points:
            label = f"{NAMES[system]} {rate(points[-1][1])}"
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        for x, y in points[:-1]:  # beside lines that rise with the memory
            axes.annotate(
                rate(y), (x, y), (-2 * side, 3 * side), textcoords="offset points", color=colour,
                ha="right" if side > 0 else "left", va="bottom" if side > 0 else "top",
            )  # fmt: skip
        for x in (x / GIB for x, y in panel.lines[system] if y is None):
            axes.plot([x], [0], marker="x", color=colour, clip_on=False)
            axes.annotate(
                f"{NAMES[system]}:\nnone finished", (x, 0), (0, 6), textcoords="offset points",
                ha="center", color=colour,
            )  # fmt: skip
    if panel.in_memory["stock"] is not None:
        axes.axhline(panel.in_memory["stock"], color=MUTED[0], linestyle=":", linewidth=1)
        axes.annotate(
            reference_text(panel), (0, panel.in_memory["stock"]), (4, 2), textcoords="offset points",
            va="bottom", color=INK[0],
        )  # fmt: skip
    axes.axvline(panel.model_bytes / GIB, color=MUTED[0], linestyle=":", linewidth=1)
    axes.grid(visible=False, axis="x")
    axes.label_outer()
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("memory limit, GiB and % of the model")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("tokens per second")
    label_lines(axes)


# ---- command line


def load(path: Path) -> dict:
    """The file of beyond_ram.py --json.

    Raises
    ------
    RotaryError
        It is something else, or was written by an earlier version or by a run that was stopped.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RotaryError(f"{path}: cannot be read, {error}; give a file of beyond_ram.py --json") from error
    wanted = ("date", "commit", "llama_cpp_python", "machine", "shapes", "rows", "runs")
    missing = [name for name in wanted if name not in (found if isinstance(found, dict) else {})]
    if missing:
        raise RotaryError(f"{path}: has no {', '.join(missing)}; write it anew with beyond_ram.py --json")
    return found


def names(_context: object, _parameter: object, value: str) -> list[str]:
    """Click callback for a comma-separated list, which may be empty."""
    return [item.strip() for item in value.split(",") if item.strip()]


@click.command()
@click.argument("figures", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="SVG to write."
)
@click.option("--routing", default="calibrated", show_default=True)
@click.option("--types", default="", callback=names, help="Panels of these only, such as q4_0,q8_0.")
@click.option("--disks", default="", callback=names, help="Panels of these only, such as fast,slow.")
def main(figures: Path, output: Path, routing: str, types: list[str], disks: list[str]) -> None:
    """Draw FIGURES, a file of beyond_ram.py --json, as SVG."""
    try:
        text = draw(load(figures), routing, types, disks)
        with writing(output) as file:
            file.write(text.encode())
    except RotaryError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{output}: written")


if __name__ == "__main__":
    main()
