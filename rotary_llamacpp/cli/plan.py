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
@click.option("--vram", help="GPU memory, such as 24GiB; 0 is none.  [default: what is free here]")
@click.option("--ram", help="Memory that can be taken, such as 64GiB.  [default: what is available here]")
@click.option("--link", default="auto", help="Memory to GPU: pcie4x16, 25GB/s; auto is PCIe 4 x16.")
@click.option("--disk", default="auto", help="Direct reads: 3.5GB/s; auto is that.")
@click.option("--ram-rate", help="Rate at which the CPU reads weights: 58GB/s.  [default: that, or measured]")
@click.option("--vram-rate", help="Rate at which the GPU reads weights.  [default: 936GB/s, an RTX 3090]")
@CTX
@click.option(
    "--prompt", type=click.IntRange(min=1), help="Tokens of the prompt.  [default: 512, or half the context]"
)
@click.option(
    "--answer", type=click.IntRange(min=1), help="Tokens of the answer.  [default: 128, or a quarter of it]"
)
@BUDGET
@STORE
@click.option("--trace", help="File of rotary trace: hit rates by replaying it.")
@click.option("--profile", default="auto", help="File of rotary profile; auto: beside the model; off.")
@click.option("--measure", is_flag=True, help="Calibrate CPU, memory and disk on this machine, in seconds.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default with --measure: all that may be used]",
)
@click.option("--plot", "plot_file", type=click.Path(), help="SVG to write: tok/s against budget.")
@JSON
def command(model: str, plot_file: str | None, as_json: bool, **asked: Any) -> None:
    """Predict speed and memory of a model, a file or a named shape, and say how to run it.

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
