# SPDX-License-Identifier: MIT
"""``rotary run``."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click

from ..config import RotaryConfig
from ..host.interrupts import exiting
from .options import JSON, NO_PROGRESS, example, generation, paging


@click.command(epilog=example('rotary run model.gguf -p "Once upon a time" -n 64 --budget 25%'))
@click.argument("model")
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@generation
@paging
@click.option("--no-mmap", is_flag=True, help="Read the file into memory instead of mapping it.")
@JSON
@click.option(
    "--live", is_flag=True, help="Show a panel of all figures on the terminal while the model runs."
)
@NO_PROGRESS
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
def command(
    model: str, prompt: str, n_predict: int, temp: float, config: RotaryConfig | None, no_mmap: bool,
    as_json: bool, live: bool, no_progress: bool, verbose: bool, **loading: Any,
) -> None:  # fmt: skip
    """Generate text on stdout, then print a line of figures on stderr."""
    with exiting():  # these import llama_cpp, so only once the options are valid
        from ..display.live import watching
        from ..runtime.generation import generate, load

    with (
        watching(off=no_progress or as_json or verbose, panel=live) as watcher,
        contextlib.closing(
            load(model, config, use_mmap=not no_mmap, verbose=verbose, watcher=watcher, **loading)
        ) as llama,
    ):
        result = generate(
            llama,
            prompt,
            n_predict,
            temp=temp,
            on_text=lambda text: None if as_json else click.echo(text, nl=False),
            watcher=watcher,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        click.echo()
        click.echo(f"rotary: {result.summary()}", err=True)
    if result.interrupted:
        sys.exit(130)
