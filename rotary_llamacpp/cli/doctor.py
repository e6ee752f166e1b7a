# SPDX-License-Identifier: MIT
"""``rotary doctor``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from ..host.interrupts import exiting
from .options import JSON, example


@click.command(epilog=example("rotary doctor"))
@click.option("--model", help="Measure the disk with this file instead of a temporary one.")
@JSON
def command(model: str | None, as_json: bool) -> None:
    """Check versions, devices, memory and disk, and say what to do."""
    with exiting():
        from ..runtime.doctor import FAIL, examine

    checks = []
    for check in examine(model):
        checks.append(check)
        if not as_json:
            click.echo(str(check))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    if any(check.verdict == FAIL for check in checks):
        sys.exit(1)
