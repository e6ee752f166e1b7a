# SPDX-License-Identifier: MIT
"""Eviction policies and prefetch on routing traces, against LRU and the optimum: two tables for each trace.

    python benchmarks/policies.py qwen.route.csv gemma.route.csv     traces of `rotary trace`, or CSV
    python benchmarks/policies.py --model models/tiny-moe-q8_0.gguf  also records a trace of this model

Hit rates are those of decode after prefill. "closed" is the share of the gap between LRU and Belady that a
policy closes. "knows n" is a policy that is told the routing of the next n tokens and is lfu beyond them,
which shows how much online policies lose. The folds are closed shares on parts of a trace: its even and odd
layers, the first and second half of its decode.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script it finds only its own folder

import click  # noqa: E402
import numpy as np  # noqa: E402

from rotary_llamacpp import policies, simulation  # noqa: E402
from rotary_llamacpp.native import binding as _native  # noqa: E402
from rotary_llamacpp.native import replay as _replay  # noqa: E402
from rotary_llamacpp.predictors import NAMES, Router  # noqa: E402
from rotary_llamacpp.traces import DECODE, Trace, load  # noqa: E402
from rotary_llamacpp.units import parse_rate  # noqa: E402

PROMPTS = ["In the beginning", "The whale", "It was a dark night, and", "My dear Watson,"]


class Certain(Router):
    """A router that is never wrong: the upper limit for any predictor."""

    accuracy = 1.0


def knowing(trace: Trace, n: int) -> policies.Factory:
    """A policy that knows the routing of the next n tokens of this trace."""
    rows = {layer: trace.experts[trace.layer == layer].tolist() for layer in trace.layers}

    class Knows(policies.Lfu):
        def __init__(self, layer: int, n_expert: int, n_slots: int, shared: dict[str, Any]) -> None:
            super().__init__(layer, n_expert, n_slots, shared)
            self.rows, self.seen = rows[trace.layers[layer]], 0

        def note(self, ids: policies.Routing, weights: policies.Weights) -> None:
            super().note(ids, weights)
            self.seen += len(ids)

        def choose(self, candidates: Any) -> int:
            coming = self.rows[self.seen : self.seen + n]

            def soon(expert: int) -> tuple[int, float]:
                steps = next((i for i, row in enumerate(coming) if expert in row), n)
                return (n - steps, self.value[expert])

            return min(candidates, key=soon)

    return Knows


def folds(trace: Trace) -> dict[str, Trace]:
    """Parts of a trace: even or odd layers, or prefill and half of the decode."""
    decode = trace.phase == DECODE
    half = np.median(np.unique(trace.step[decode]))
    later = trace.select(~decode | (trace.step > half))
    parts = {
        "even": trace.select(trace.layer % 2 == 0),
        "odd": trace.select(trace.layer % 2 == 1),
        "first": trace.select(trace.step <= half),
        "second": later,
    }
    for part in parts.values():
        there = set(np.unique(part.layer).tolist())
        part.expert_bytes = {layer: n for layer, n in part.expert_bytes.items() if layer in there}
    return parts


def closed(trace: Trace, policy: policies.Factory | str, n_slots: list[int], adaptive: bool = False) -> float:
    """Share of the hit-rate gap between LRU and Belady that the policy closes; 1.0 if there is no gap."""
    lru = simulation.replay(trace, "lru", n_slots).hit_rate or 0.0
    best = simulation.belady(trace, n_slots).hit_rate or 0.0
    found = simulation.replay(trace, policy, n_slots, adaptive=adaptive).hit_rate or 0.0
    return (found - lru) / (best - lru) if best > lru else 1.0


def cost_us(trace: Trace, policy: str, n_slots: list[int], adaptive: bool) -> float:
    """Microseconds per request in native code, the slot table included; the median of five replays."""
    index = np.searchsorted(trace.layers, trace.layer).astype(np.int32)
    ids = np.ascontiguousarray(trace.experts, np.int32)
    times = []
    for _ in range(5):
        least = trace.experts.shape[1] if adaptive else None
        cache = _replay.Cache(_native.load(), policy, trace.n_expert, n_slots, least)
        start = time.perf_counter()
        cache.replay(index, ids)
        times.append(1e6 * (time.perf_counter() - start) / int((ids >= 0).sum()))
    return float(np.median(times))


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def eviction(trace: Trace, share: float) -> list[list[str]]:
    n_slots = simulation.slots_for(trace, share)
    best = simulation.belady(trace, n_slots).hit_rate
    rows = []
    for name, adaptive in (*((name, False) for name in policies.NATIVE), ("recall", True)):
        rate = simulation.replay(trace, name, n_slots, adaptive=adaptive).hit_rate
        gaps = [
            percent(closed(part, name, [n_slots[0]] * len(part.layers), adaptive))
            for part in folds(trace).values()
        ]
        rows.append(
            [f"{name}, adaptive split" if adaptive else name, percent(rate),
             percent(closed(trace, name, n_slots, adaptive)), " ".join(gaps),
             f"{cost_us(trace, name, n_slots, adaptive):.2f}"]
        )  # fmt: skip
    for n in (1, 2, 4, 8):
        rate = simulation.replay(trace, knowing(trace, n), n_slots).hit_rate
        rows.append([f"knows {n}", percent(rate), percent(closed(trace, knowing(trace, n), n_slots)), "", ""])
    return [*rows, ["belady", percent(best), "100.0", "", ""]]


def prefetch(trace: Trace, share: float, link: simulation.Link, depth: int) -> list[list[str]]:
    n_slots = simulation.slots_for(trace, share)
    rows = []
    for name in (None, *NAMES, "certain"):
        its = Certain(trace) if name == "certain" else simulation.predictor(trace, name) if name else None
        found = simulation.replay(trace, "recall", n_slots, link, its, depth)
        used = found.prefetch_used
        rows.append(
            [name or "none", percent(found.hit_rate), percent(found.byte_hit_rate),
             f"{found.tokens_per_second:.1f}", f"{found.stall_us / found.tokens / 1000:.2f}",
             percent(used / found.prefetched if found.prefetched else None),
             percent(1 - found.late_hits / used if used else None)]
        )  # fmt: skip
    return rows


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def record_one(model: Path) -> Trace:
    from rotary_llamacpp import RotaryConfig
    from rotary_llamacpp.runtime.recording import record

    return record(str(model), PROMPTS, 150, RotaryConfig(budget="50%", verbose=False), seed=1, n_ctx=512)


@click.command(help=__doc__)
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--model", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Record a trace of it."
)
@click.option("--budgets", default="12.5,25", show_default=True, help="Percent of all experts.")
@click.option("--link", default="pcie4x16", show_default=True)
@click.option("--compute", default=3.0, show_default=True, help="Milliseconds of a token.")
@click.option("--depth", default=2, show_default=True, help="Layers to predict ahead.")
def main(
    files: tuple[Path, ...], model: Path | None, budgets: str, link: str, compute: float, depth: int
) -> None:
    traces = {path.name: load(path) for path in files}
    if model is not None:
        traces[model.name] = record_one(model)
    medium = simulation.Link(parse_rate(link), 1000 * compute)
    for name, trace in traces.items():
        for share in (float(each) / 100 for each in budgets.split(",")):
            slots = simulation.slots_for(trace, share)[0]
            click.echo(f"\n### {name}, {100 * share:g} %: {slots} of {trace.n_expert} slots a layer\n")
            heads = ["policy", "hit rate", "closed", "closed: even, odd, first, second", "us a request"]
            click.echo(table(heads, eviction(trace, share)))
            heads = ["prefetch", "hit rate", "of bytes", "tok/s", "stall ms", "accuracy", "in time"]
            click.echo(f"\nrecall, {link}, {compute:g} ms a token, {depth} layers ahead:\n")
            click.echo(table(heads, prefetch(trace, share, medium, depth)))


if __name__ == "__main__":
    main()
