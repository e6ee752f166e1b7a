# SPDX-License-Identifier: MIT
"""``rotary backend-path``."""

from __future__ import annotations

import click

from ..host.machine import check_library_machine
from ..native.binding import library_path
from .options import example


@click.command(epilog=example('GGML_BACKEND_PATH="$(rotary backend-path)" llama-cli -m model.gguf -ngl 99'))
def command() -> None:
    """Print the native library's path, for GGML_BACKEND_PATH."""
    path = library_path()
    check_library_machine(path)
    click.echo(str(path))
