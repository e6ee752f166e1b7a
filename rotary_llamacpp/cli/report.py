# SPDX-License-Identifier: MIT
"""``rotary report``."""

from __future__ import annotations

from typing import Any

import click

from ..host.interrupts import exiting
from ..policies import NATIVE
from .options import COMPUTE, Names, Shares, example


@click.command(epilog=example("rotary report model.trace -o report.html"))
@click.argument("trace_file", metavar="TRACE")
@click.option("-o", "--output", required=True, type=click.Path(), help="HTML file to write.")
@click.option(
    "--policies",
    default="lru,lfu,recall",
    type=Names(NATIVE),
    help="Policies, by commas; the last one also with prefetch.",
)
@click.option(
    "--budgets", default="5,12.5,25,50,75", type=Shares(), help="Percentages of all experts, by commas."
)
@click.option("--link", default="pcie4x16", help="Bandwidth to the slots: 25GB/s, pcie4x16, ...")
@COMPUTE
@click.option("--depth", default=2, type=click.IntRange(1, 8), help="Layers to predict ahead.")
def command(trace_file: str, output: str, compute: float, **asked: Any) -> None:
    """Write one HTML page about a trace: popular experts, policies, prefetch and time."""
    with exiting():
        from ..display.report import write_report

    write_report(trace_file, output, compute_us=1000 * compute, **asked)
    click.echo(f"{output}: written")
