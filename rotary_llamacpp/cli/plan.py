# SPDX-License-Identifier: MIT
"""``rotary plan``."""

from __future__ import annotations

import json
from typing import Any

import click

from ..host.interrupts import exiting
from .options import BUDGET, CTX, JSON, STORE, example


@click.command(epilog=example("rotary plan qwen3-30b-a3b --vram 12GiB --ram 64GiB --link pcie4x16"))
@click.argument("model")
@click.option(
    "--type", "type_name", help="Type of a named shape: q4_k_m, q8_0, ...  [default: the usual one]"
)
@click.option("--vram", help="GPU memory, such as 24GiB; 0 is none.  [default: what is free on this machine]")
@click.option("--ram", help="Memory to use, such as 64GiB.  [default: what is available on this machine]")
@click.option(
    "--link", default="auto", help="Rate from memory to the GPU: pcie4x16, 25GB/s, ...; auto is pcie4x16."
)
@click.option("--disk", default="auto", help="Rate of direct reads; auto is 3.5GB/s.")
@click.option("--ram-rate", help="Rate at which the CPU reads weights.  [default: 58GB/s, or measured]")
@click.option("--vram-rate", help="Rate at which the GPU reads weights.  [default: 936GB/s, an RTX 3090]")
@CTX
@click.option(
    "--prompt", type=click.IntRange(min=1), help="Tokens of the prompt.  [default: 512, or half the context]"
)
@click.option(
    "--answer",
    type=click.IntRange(min=1),
    help="Tokens of the answer.  [default: 128, or a quarter of the context]",
)
@BUDGET
@STORE
@click.option("--trace", help="Trace to replay for hit rates, recorded by rotary trace.")
@click.option(
    "--profile",
    default="auto",
    help="Profile to expect hit rates by; auto is the one beside the model or in it; off is none.",
)
@click.option("--measure", is_flag=True, help="Measure the rates of this machine, which takes some seconds.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default with --measure: all usable CPUs]",
)
@click.option("--plot", "plot_file", type=click.Path(), help="SVG file to write, with tok/s against budget.")
@JSON
def command(model: str, plot_file: str | None, as_json: bool, **asked: Any) -> None:
    """Predict speed and memory of a model file or a named shape, and say how to run it.

    \b
    Shapes: mixtral-8x7b, mixtral-8x22b, qwen3-30b-a3b, qwen3-235b-a22b,
    gpt-oss-20b, gpt-oss-120b, deepseek-v3.
    """
    with exiting():
        from ..display.plan import describe, write_plot
        from ..planning.plan import make, to_dict

    found = make(model, **asked)
    if plot_file is not None:
        write_plot(found, plot_file)
    click.echo(json.dumps(to_dict(found)) if as_json else describe(found))
