# SPDX-License-Identifier: MIT
"""``rotary profile``."""

from __future__ import annotations

import click

from ..host.interrupts import exiting
from .options import example


@click.command(epilog=example("rotary profile model.gguf a.trace b.trace"))
@click.argument("model")
@click.argument("trace_files", metavar="TRACE...", nargs=-1, required=True)
@click.option("-o", "--output", help="File to write.  [default: beside the model]", type=click.Path())
def command(model: str, trace_files: tuple[str, ...], output: str | None) -> None:
    """Learn from traces which experts a model uses most, so that runs begin with them resident."""
    with exiting():
        from .. import traces
        from ..traces import profiles

    found = profiles.learn([traces.load(path) for path in trace_files])
    path = output or profiles.beside(model)
    found.save(path)
    click.echo(f"{path}: {found.n_tokens} tokens, {len(found.layers)} layers of {found.n_expert} experts")
