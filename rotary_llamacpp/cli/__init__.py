# SPDX-License-Identifier: MIT
"""The command ``rotary``: one module per subcommand, imported on first use; none contains logic.

Exit status: 0 done, 1 the doctor found a failure, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ..errors import RotaryError
from ..host.interrupts import exiting

_NAMES = (
    "backend-path", "convert", "doctor", "info", "plan", "profile", "report", "run", "simulate", "trace",
)  # fmt: skip


class _Commands(Mapping[str, click.Command]):
    """Maps the name of a subcommand to `command` in the module of that name."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in _NAMES:
            raise KeyError(name)
        with exiting():
            module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        found: click.Command = module.command
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


class _Group(click.Group):
    """Turns errors into one line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RotaryError as error:
            line = " ".join(str(error).splitlines())  # file names may contain line breaks
            click.echo(f"rotary: {line}", err=True)
        except MemoryError as error:
            click.echo(f"rotary: not enough memory{f' ({error})' if str(error) else ''}; free some", err=True)
        except KeyboardInterrupt:
            click.echo("rotary: interrupted", err=True)
            sys.exit(130)
        sys.exit(2)


@click.group(
    cls=_Group,
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="rotary-llamacpp")
def main() -> None:
    """Run Mixture-of-Experts models with only some of their experts in memory."""
