# SPDX-License-Identifier: MIT
"""``rotary convert``."""

from __future__ import annotations

import click

from ..host.interrupts import exiting
from .options import NO_PROGRESS, Size, example


@click.command(epilog=example("rotary convert model-00001-of-00009.gguf paged.gguf --dry-run"))
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--split-size",
    metavar="SIZE",
    type=Size(),
    help="Maximum size of an output file, such as 40GB.  [default: one file]",
)
@click.option("--alignment", default=4096, help="Alignment of every tensor, in bytes.")
@click.option(
    "--profile",
    default="auto",
    help="Profile to store, made by rotary profile; auto is the one beside IN or in it; off is none.",
)
@click.option(
    "--experts",
    metavar="TYPE",
    help="Type to quantise the experts to: Q3_K, IQ4_XS, ...  [default: unchanged]",
)
@click.option("--rest", metavar="TYPE", help="Type to quantise all other weights to.  [default: unchanged]")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Type for tensors whose names match this regular expression; the first match wins, and goes before "
    "--experts and --rest.",
)
@click.option(
    "--imatrix", type=click.Path(), help="Importance matrix to quantise with, a GGUF from llama-imatrix."
)
@click.option("--verify", is_flag=True, help="Read the result back and compare every tensor.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, without doing it.")
@NO_PROGRESS
def command(
    source: str, out: str, split_size: int | None, alignment: int, profile: str, experts: str | None,
    rest: str | None, types: tuple[str, ...], imatrix: str | None, verify: bool, force: bool, dry_run: bool,
    no_progress: bool,
) -> None:  # fmt: skip
    """Rewrite a model for paging: experts together and page-aligned.

    IN is a GGUF, the first of its shards, or a Hugging Face folder of safetensors. OUT is a GGUF that stock
    llama.cpp loads too, with the same output unless it is quantised. After an interruption, the same
    command resumes where it stopped; only quantising starts over.
    """
    with exiting():
        from ..conversion.convert import Options, convert
        from ..conversion.quantising import Wish
        from ..display.bars import bars

    options = Options(alignment, split_size, profile, Wish(experts, rest, types, imatrix), verify, force)
    paths = convert(
        source, out, options, dry_run=dry_run, say=lambda line: click.echo(line, err=not dry_run),
        bar=bars(off=no_progress),
    )  # fmt: skip
    if not dry_run:
        click.echo(str(paths[0]))
