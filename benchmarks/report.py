# SPDX-License-Identifier: MIT
"""Tables and targets of beyond_ram.py, from its runs. Pure logic: opens nothing, measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cells import Variant
from rotary_llamacpp.units import MIB

Figure = Callable[[dict], float | None]


def select(runs: list[dict], **wanted: object) -> list[dict]:
    """The runs whose fields have these values."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def variant_of(run: dict) -> Variant:
    """The variant that a run measured."""
    return Variant(run["system"], run["repack"], run["read_ahead"], run["prefetch"])


def prefill(run: dict) -> float | None:
    """Prefill in tokens per second; None if the run did not finish."""
    return run.get("prefill")


def decode(stream: str) -> Figure:
    """A figure: decode of a stream in tokens per second."""
    return lambda run: run.get("streams", {}).get(stream, {}).get("decode")


def stat(stream: str, name: str) -> Figure:
    """A figure: a value of `rotary_stats` after a stream; None where the library does not know it."""
    return lambda run: run.get("streams", {}).get(stream, {}).get("stats", {}).get(name)


def median(runs: list[dict], figure: Figure) -> float | None:
    """Median over the runs that have the figure; None if no run has it."""
    values = [value for value in map(figure, runs) if value is not None]
    return statistics.median(values) if values else None


def best(runs: list[dict], figure: Figure) -> tuple[Variant | None, float | None]:
    """The variant with the highest median among those measured most often, and that median.

    A variant that only the first round ran is not compared with medians, since its single run may be lucky.
    """
    by_variant: dict[Variant, list[float]] = {}
    for run in runs:
        value = figure(run)
        if value is not None:
            by_variant.setdefault(variant_of(run), []).append(value)
    most = max(map(len, by_variant.values()), default=0)
    medians = {v: statistics.median(values) for v, values in by_variant.items() if len(values) == most}
    return max(medians.items(), key=lambda item: item[1], default=(None, None))


def ratio(value: float | None, of: float | None) -> float | None:
    """`value` / `of`; None if either is unknown or `of` is 0."""
    return value / of if value is not None and of else None


# ---- rows -------------------------------------------------------------------------------------------------


def rows(everything: dict) -> list[dict]:
    """A row for each stream of each cell that is shown."""
    return [
        row(everything, cell, stream)
        for cell in everything["cells"]
        if cell["shown"]
        for stream in cell["streams"]
    ]


def row(everything: dict, cell: dict, stream: str) -> dict:
    """The figures of one stream in one cell.

    Rotary's decode is that of its best layout with prefetch on; `missed_bytes` per token are those with
    prefetch off, which reads nothing in vain. `roofline` is the share reached of the speed that computing
    alone (stock in memory, same layout) or reading the missed bytes at the disk's plain bandwidth would
    allow, whichever is lower. `read_share` of that bandwidth can exceed 1 on a throttled disk, which lets
    short bursts through faster.
    """
    runs = select(everything["runs"], cell=cell["name"])
    repacks = everything["repacks"].get(cell["type"], True)
    stock, rotary = select(runs, system="stock"), select(runs, system="rotary", prefetch=True)
    found = {
        name: cell[name] for name in ("type", "disk", "memory", "kind")
    } | {
        "routing": stream,
        "overlap": everything["overlap"][f"{cell['type']} {cell['kind']}"].get(stream),
    }  # fmt: skip
    speed = decode(stream)
    ours: Variant | None = None
    for name, figure in (("decode", speed), ("prefill", prefill)):
        if name == "prefill" and stream != cell["streams"][0]:
            continue  # the streams of a cell share their prefill
        variants = {}
        for system, those in (("stock", stock), ("rotary", rotary)):
            variants[system], found[f"{name}_{system}"] = best(those, figure)
            known = variants[system]
            found[f"{name}_{system}_variant"] = None if known is None else known.name(repacks)
        found[f"{name}_ratio"] = ratio(found[f"{name}_rotary"], found[f"{name}_stock"])
        if name == "decode":
            ours = variants["rotary"]
    found["unfinished"] = {
        system: sorted(
            {f"{variant_of(r).name(repacks)}: {r['outcome']}" for r in those if r["outcome"] != "measured"}
        )
        for system, those in (("stock", stock), ("rotary", rotary))
    }
    if ours is None:
        return found

    on = select(rotary, repack=ours.repack, outcome="measured")
    off = select(runs, system="rotary", prefetch=False, outcome="measured")  # all of one layout
    off_layout = off[0]["repack"] if off else ours.repack
    n_tokens = everything["settings"]["n_decode"]
    for name in (
        "hit_rate", "n_slots", "store", "io", "prefetch_accuracy", "prefetch_coverage", "prefetch_timeliness"
    ):  # fmt: skip
        values = [value for value in map(stat(stream, name), on) if value is not None]
        number = values and isinstance(values[0], (int, float))
        found[name] = (statistics.median(values) if number else values[0]) if values else None
    found["rounds"] = len(on)
    found["peak_bytes"] = max((r["peak_bytes"] for r in on if r["peak_bytes"] is not None), default=None)
    found["limit_bytes"] = on[0]["limit_bytes"]
    found["prefetch_gain"] = ratio(median(select(rotary, repack=off_layout), speed), median(off, speed))
    found["missed_bytes"] = ratio(median(off, stat(stream, "bytes_paged")), n_tokens)
    bandwidth = everything["disks"][cell["disk"]]["bandwidth"]
    in_memory = select(
        everything["runs"], type=cell["type"], kind=cell["kind"], memory=None, system="stock",
        repack=ours.repack, outcome="measured",
    )  # fmt: skip
    compute_s = ratio(1.0, median(in_memory, speed))
    found["compute_s"] = compute_s
    if cell["memory"] is not None and None not in (found["missed_bytes"], compute_s, bandwidth):
        found["roofline"] = max(compute_s, found["missed_bytes"] / bandwidth) * found["decode_rotary"]
    found["read_share"] = ratio(median(on, reading(stream)), bandwidth)
    return found


def reading(stream: str) -> Figure:
    """A figure: bytes per second while a read was outstanding; None if nothing was read by direct I/O."""

    def figure(run: dict) -> float | None:
        n_bytes, us = stat(stream, "bytes_read")(run), stat(stream, "read_us")(run)
        return 1e6 * n_bytes / us if n_bytes and us else None

    return figure


# ---- targets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that rows should reach: the first level at least, each further level is better."""

    name: str
    figure: str
    levels: tuple[float, ...]
    routings: tuple[str, ...] = ("calibrated", "random")
    memory: tuple[float | None, ...] | None = None  # None: every limit

    def applies(self, row: dict) -> bool:
        """Whether the target applies to this row."""
        if row["routing"] not in self.routings or (
            self.figure.startswith("prefill") and self.figure not in row
        ):
            return False
        return row["memory"] is not None if self.memory is None else row["memory"] in self.memory


TARGETS = (
    Target("decode of stock's best at 60 %", "decode_ratio", (1.3, 2.0), ("calibrated",), (0.6,)),
    Target("decode of stock's best at 35 %", "decode_ratio", (1.5, 2.5), ("calibrated",), (0.35,)),
    Target("decode of stock's best, random", "decode_ratio", (1.4, 2.5), ("random",)),
    Target("decode of stock's best, repeat", "decode_ratio", (1.0,), ("repeat",)),
    Target("prefill of stock's best", "prefill_ratio", (1.5, 3.0)),
    Target("decode of stock's best in memory", "decode_ratio", (0.97,), ("calibrated", "random"), (None,)),
    Target("share of the roofline", "roofline", (0.90,)),
    Target("bandwidth while reading, of the plain reader's", "read_share", (0.90,)),
    Target("decode with prefetch on, of off", "prefetch_gain", (1.0,)),
)


def targets(found: list[dict]) -> list[dict]:
    """For each target and disk the lowest figure, the levels it meets, and the rows without a figure."""
    results = []
    for target in TARGETS:
        about = [row for row in found if target.applies(row)]
        for disk in dict.fromkeys(row["disk"] for row in about):
            here = [row for row in about if row["disk"] == disk]
            known = [row for row in here if row.get(target.figure) is not None]
            unknown = [name_of(row) for row in here if row.get(target.figure) is None]
            lowest = min(known, key=lambda row: row[target.figure], default=None)
            figure = None if lowest is None else lowest[target.figure]
            failed = [name_of(row) for row in here if row.get("decode_rotary") is None]
            results.append({
                "target": target.name, "disk": None if target.memory == (None,) else disk, "figure": figure,
                "row": None if lowest is None else name_of(lowest), "n_rows": len(known), "failed": failed,
                "without_figure": [name for name in unknown if name not in failed],
                "levels": [
                    {"level": level, "met": False if failed else None if figure is None else figure >= level}
                    for level in target.levels
                ],
            })  # fmt: skip
    return results


def name_of(row: dict) -> str:
    """A row in words, without its disk."""
    return f"{row['type']}, {memory_of(row)}, {row['routing']}"


def memory_of(row: dict) -> str:
    """The memory limit in words."""
    return "fits" if row["memory"] is None else f"{row['memory']:.0%}"


# ---- text -------------------------------------------------------------------------------------------------

COLUMNS = (
    "memory", "routing", "lag-1 overlap", "stock tok/s", "Rotary tok/s", "of stock", "stock prefill",
    "Rotary prefill", "of stock", "hit rate", "missed MiB/token", "of roofline", "prefetch on/off",
    "accuracy, coverage, timeliness", "reading, of plain reader", "peak MiB, of limit", "rounds",
    "not finished",
)  # fmt: skip


def lines(everything: dict) -> list[str]:
    """The tables, one for each type and disk, and the targets."""
    machine, settings = everything["machine"], everything["settings"]
    text = [
        f"{machine['cpu']}, {machine['n_threads']} threads, Linux {machine['kernel']}; prompt of "
        f"{settings['n_prompt']} tokens, {settings['n_decode']} decoded after {settings['n_warm']}; medians"
    ]
    text += [f"{name} disk left out: {why}" for name, why in everything["skipped"].items()]
    found = everything["rows"]
    for type_, disk, fits in dict.fromkeys((r["type"], r["disk"], r["memory"] is None) for r in found):
        those = [r for r in found if (r["type"], r["disk"], r["memory"] is None) == (type_, disk, fits)]
        size = max(n for name, n in everything["models"].items() if name.split()[0] == type_)
        head = f"{type_}, {size / MIB:.0f} MiB"
        if fits:
            text += ["", f"### {head}, in memory", ""]
        else:
            known = everything["disks"][disk]
            plain = f"plain reader {known['bandwidth'] / MIB:.0f} MiB/s"
            text += ["", f"### {head}, {disk} disk: {plain} ({known['what']})", ""]
        text += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        text += ["| " + " | ".join(cells_of(row)) + " |" for row in those]
    if everything["targets"]:
        text += ["", "### Targets", "", *map(target_line, everything["targets"])]
    return text


def cells_of(row: dict) -> list[str]:
    """A row's text by column."""

    def number(name: str, form: str, factor: float = 1.0) -> str:
        value = row.get(name)
        return "" if value is None else format(value * factor, form)

    def named(name: str, form: str) -> str:
        return f"{number(name, form)} ({row[name + '_variant']})" if row.get(name) is not None else ""

    prefetch = [number(f"prefetch_{name}", ".0%") for name in ("accuracy", "coverage", "timeliness")]
    peak = number("peak_bytes", ".0f", 1 / MIB)
    unfinished = [f"{system}, {text}" for system, texts in row["unfinished"].items() for text in texts]
    return [
        memory_of(row), row["routing"], number("overlap", ".0%"), named("decode_stock", ".1f"),
        named("decode_rotary", ".1f"), number("decode_ratio", ".2f"), named("prefill_stock", ".0f"),
        named("prefill_rotary", ".0f"), number("prefill_ratio", ".2f"), number("hit_rate", ".1%"),
        number("missed_bytes", ".1f", 1 / MIB), number("roofline", ".2f"), number("prefetch_gain", ".2f"),
        ", ".join(filter(None, prefetch)), number("read_share", ".2f"),
        f"{peak} of {number('limit_bytes', '.0f', 1 / MIB)}" if peak else "", str(row.get("rounds", "")),
        "; ".join(unfinished),
    ]  # fmt: skip


def target_line(result: dict) -> str:
    """A target in words."""
    where = "" if result["disk"] is None else f", {result['disk']} disk"
    if result["figure"] is None:
        said = "no figure"
    else:
        of = f", lowest of {result['n_rows']}" if result["n_rows"] > 1 else ""
        said = f"{result['figure']:.2f} ({result['row']}{of})"
    words = {None: "not measured", True: "met", False: "missed"}
    verdict = ", ".join(f"{level['level']:.2f} {words[level['met']]}" for level in result["levels"])
    rest = ""
    for what, which in (("Rotary did not finish", "failed"), ("no figure for", "without_figure")):
        if result[which]:
            rest += f"; {what} {'; '.join(result[which])}"
    return f"- {result['target']}{where}: {said}: {verdict}{rest}"
