# SPDX-License-Identifier: MIT
"""Options that several commands share, and the types that parse their values.

`paging` adds all options of how a model is paged, and makes one `RotaryConfig` from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..config import PINS, SPLITS, STORES, RotaryConfig
from ..policies import AUTO, NATIVE
from ..predictors import NAMES as PREDICTORS
from ..units import parse_shares, parse_size

Command = Callable[..., Any]


def example(line: str) -> str:
    """Format an example as the epilog of a command."""
    return f"\b\nExample:\n  {line}"


# ---- parsing values


class Number(click.FloatRange):
    """A finite number; the range check alone would let NaN and infinity pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not math.isfinite(number := super().convert(value, param, ctx)):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Size(click.ParamType):
    """Bytes, from text such as 40GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_size(value)


class Shares(click.ParamType):
    """Shares of 1, from percentages separated by commas."""

    name = "percentages"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_shares(value)


class Names(click.ParamType):
    """Names separated by commas; "all" stands for all known names."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return list(self.known) if value == "all" else value.split(",")


# ---- single options


def choice(names: Sequence[str]) -> str:
    """Format a metavar; `RotaryConfig` checks the value, so that Python callers get the same message."""
    return f"[{'|'.join(names)}]"


BUDGET = click.option(
    "--budget",
    default="auto",
    help='Memory for experts: auto, min, 25% or 0.25, 8GiB, bytes, "16 slots" per layer; 0 turns paging off.',
)
STORE = click.option(
    "--store",
    default="auto",
    metavar=choice(STORES),
    help="Where experts come from: mmap is the mapped file, direct is reads past the page cache; auto is "
    "direct where the experts do not fit into memory.",
)
CTX = click.option(
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=1),
    help="Context in tokens.  [default: the model's, at most 4096]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
NO_PROGRESS = click.option("--no-progress", is_flag=True, help="Do not show progress on a terminal.")
COMPUTE = click.option(
    "--compute",
    default=3.0,
    type=Number(min=0, min_open=True),
    help="Milliseconds to compute a token whose experts are all resident.",
)


# ---- groups of options


def _unset(_ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    return not value


_PAGING = {  # by field of RotaryConfig
    "budget": BUDGET,
    "inner": click.option(
        "--inner", help="ggml device that computes: CPU, CUDA0, ...  [default: first GPU, else CPU]"
    ),
    "repack": click.option(
        "--no-repack",
        "repack",
        is_flag=True,
        callback=_unset,
        help="Do not repack weights for the CPU's kernels.",
    ),
    "direct": click.option(
        "--no-direct",
        "direct",
        is_flag=True,
        callback=_unset,
        help="Page in experts for long prompts too, instead of computing from the mapped file.",
    ),
    "store": STORE,
    "prefetch": click.option(
        "--prefetch",
        default=AUTO,
        metavar=choice((AUTO, *PREDICTORS)),
        help="Predictor of the experts to prefetch; auto is router, or mixed where that is not possible.",
    ),
    "staging": click.option(
        "--staging", metavar="SIZE", help="Memory for direct reads in flight, such as 64MiB."
    ),
    "pin": click.option(
        "--pin",
        default="auto",
        metavar=choice(PINS),
        help="Pin experts in host memory for a GPU; auto does if they take at most 3/4 of available memory.",
    ),
    "policy": click.option(
        "--policy",
        default=AUTO,
        metavar=choice((AUTO, *NATIVE)),
        help="Eviction policy; auto is recall, or lfu where a GPU resolves lookups itself.",
    ),
    "split": click.option(
        "--split",
        default=SPLITS[0],
        metavar=choice(SPLITS),
        help="Slots of layers: adaptive rebalances them to save more misses, on the CPU; even never does.",
    ),
    "profile": click.option(
        "--profile",
        default="auto",
        help="Profile to fill the slots with; auto is the one beside the model or in it; off is none.",
    ),
}
_NO_PREFETCH = click.option(
    "--no-prefetch", is_flag=True, help="Do not prefetch what the next layers may want."
)


def paging(command: Command) -> Command:
    """Add the paging options to a command, which gets `config`, a `RotaryConfig` or None if paging is off."""

    @functools.wraps(command)
    def configured(*, no_prefetch: bool, **given: Any) -> Any:
        fields = {name: given.pop(name) for name in _PAGING}
        if no_prefetch:
            fields["prefetch"] = False
        config = RotaryConfig.from_any({**fields, "verbose": not given.get("as_json")})
        return command(config=config, **given)

    return _with((*_PAGING.values(), _NO_PREFETCH), configured)


def generation(command: Command) -> Command:
    """Add the options of text generation to a command: n_predict, temp, seed, n_ctx and n_threads."""
    return _with(
        (
            click.option(
                "-n",
                "--n-predict",
                default=128,
                type=click.IntRange(min=0),
                help="Maximum number of tokens to generate per prompt.",
            ),
            click.option(
                "--temp", default=0.8, type=Number(min=0), help="Sampling temperature; 0 is greedy."
            ),
            click.option(
                "--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.  [default: random]"
            ),
            CTX,
            click.option(
                "--threads",
                "n_threads",
                type=click.IntRange(min=1),
                help="CPU threads.  [default: half of the usable CPUs; all of them for the prompt]",
            ),
        ),
        command,
    )


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
