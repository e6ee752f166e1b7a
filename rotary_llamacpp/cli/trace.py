# SPDX-License-Identifier: MIT
"""``rotary trace``."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..config import RotaryConfig
from ..host.interrupts import exiting
from .options import example, generation, paging


@click.command(epilog=example("rotary trace model.gguf --prompts prompts.txt -o model.trace"))
@click.argument("model")
@click.option("--prompts", "prompt_file", required=True, help="Text file, one prompt per line.")
@click.option(
    "-o",
    "--output",
    required=True,
    help="Trace to write, as CSV if the name ends in .csv.",
    type=click.Path(),
)
@generation
@paging
def command(model: str, prompt_file: str, output: str, config: RotaryConfig | None, **asked: Any) -> None:
    """Record which experts a model chooses while it answers prompts."""
    with exiting():
        from ..host.files import check_writable
        from ..runtime.recording import read_prompts, record

    prompts = read_prompts(prompt_file)
    check_writable(output)

    def on_prompt(number: int, n_tokens: int) -> None:
        click.echo(f"rotary: prompt {number + 1} of {len(prompts)}, {n_tokens} tokens", err=True)

    found = record(model, prompts, config=config, on_prompt=on_prompt, **asked)
    found.save(output)
    click.echo(f"{output}: {found.describe()}")
    interrupted = found.about.get("interrupted")
    if reason := "interrupted" if interrupted else found.about.get("failed"):
        recorded = f"{found.about['prompts']} of {len(prompts)} prompts are in {output}"
        click.echo(f"rotary: {reason}; {recorded}", err=True)
        sys.exit(130 if interrupted else 2)
