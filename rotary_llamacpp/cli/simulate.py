# SPDX-License-Identifier: MIT
"""``rotary simulate``."""

from __future__ import annotations

import json
from typing import Any

import click

from ..config import SPLITS
from ..host.interrupts import exiting
from ..policies import NATIVE
from ..predictors import NAMES as PREDICTORS
from .options import COMPUTE, JSON, Names, Number, Shares, example


@click.command(epilog=example("rotary simulate model.trace --budgets 12.5,25 --link pcie4x16 --compute 3"))
@click.argument("trace_file", metavar="TRACE")
@click.option(
    "--policies", default="all", type=Names(NATIVE), help=f"all, or by commas: {', '.join(NATIVE)}."
)
@click.option(
    "--budgets", default="5,12.5,25,50", type=Shares(), help="Percentages of all experts, by commas."
)
@click.option("--link", help="Bandwidth to the slots: 25GB/s, pcie4x16, ...  [default: none, only counts]")
@COMPUTE
@click.option(
    "--latency", default=0.0, type=Number(min=0), help="Microseconds added to each lookup that misses."
)
@click.option(
    "--predictors",
    default="none",
    type=Names(("none", *PREDICTORS)),
    help="Predictors to prefetch with, by commas; none does not prefetch.",
)
@click.option("--profile", help="Profile, made by rotary profile, that predictors begin with.")
@click.option("--depth", default=1, type=click.IntRange(1, 8), help="Layers to predict ahead.")
@click.option("--split", default=SPLITS[0], type=click.Choice(SPLITS), help="As for rotary run.")
@JSON
def command(trace_file: str, compute: float, latency: float, split: str, as_json: bool, **asked: Any) -> None:
    """Replay a trace under eviction policies, budgets, links and predictors."""
    with exiting():
        from ..display.tables import comparison
        from ..simulation.comparison import compare

    rows = compare(
        trace_file, compute_us=1000 * compute, latency_us=latency, adaptive=split == "adaptive", **asked
    )
    click.echo(json.dumps(rows) if as_json else "\n".join(comparison(rows)))
