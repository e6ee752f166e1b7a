# SPDX-License-Identifier: MIT
"""``rotary info``."""

from __future__ import annotations

import json

import click

from ..gguf_files.info import ModelInfo
from .options import JSON, example


@click.command(epilog=example("rotary info model.gguf"))
@click.argument("model")
@JSON
def command(model: str, as_json: bool) -> None:
    """Show a model's experts and the memory that paging needs, without loading weights."""
    found = ModelInfo.read(model)
    click.echo(json.dumps(found.to_dict()) if as_json else found.describe())
