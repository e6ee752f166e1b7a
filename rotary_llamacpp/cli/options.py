# SPDX-License-Identifier: MIT
"""Options that several commands share, and how values of options are read.

`paging` has all that say how a model is paged, and makes one `RotaryConfig` of them.
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
    """A command's epilog."""
    return f"\b\nExample:\n  {line}"


# ---- how values are read


class Number(click.FloatRange):
    """A finite number: comparisons let NaN pass, and infinity is no temperature, and no time."""

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
    """Names separated by commas; "all" stands for every one that is known."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return list(self.known) if value == "all" else value.split(",")


# ---- single options


def choice(names: Sequence[str]) -> str:
    """A metavar. Values are checked where configurations are, in the same words for everybody."""
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
    help="Where experts come from: the mapped file, or direct reads past the page cache; auto reads directly "
    "where they do not fit into memory.",
)
CTX = click.option(
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=1),
    help="Context in tokens.  [default: the model's, at most 4096]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
NO_PROGRESS = click.option("--no-progress", is_flag=True, help="Show no progress on a terminal.")
COMPUTE = click.option(
    "--compute",
    default=3.0,
    type=Number(min=0, min_open=True),
    help="Milliseconds of a token whose experts are all resident.",
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
        help="Keep the plain weight layout on the CPU.",
    ),
    "direct": click.option(
        "--no-direct",
        "direct",
        is_flag=True,
        callback=_unset,
        help="Page long prompts too instead of computing from the mapped file.",
    ),
    "store": STORE,
    "prefetch": click.option(
        "--prefetch",
        default=AUTO,
        metavar=choice((AUTO, *PREDICTORS)),
        help="What predicts the experts to prefetch; auto is the next layers' routers, or a substitute.",
    ),
    "staging": click.option(
        "--staging", metavar="SIZE", help="Memory for direct reads in flight, such as 64MiB."
    ),
    "pin": click.option(
        "--pin",
        default="auto",
        metavar=choice(PINS),
        help="Pin the experts in host memory for a GPU; auto does if they take at most 3/4 of free memory.",
    ),
    "policy": click.option(
        "--policy",
        default=AUTO,
        metavar=choice((AUTO, *NATIVE)),
        help="Which expert to evict; auto is the best policy that can run where lookups are resolved.",
    ),
    "split": click.option(
        "--split",
        default=SPLITS[0],
        metavar=choice(SPLITS),
        help="Rebalance slots to the layers where they save more misses, on the CPU, or divide them evenly.",
    ),
    "profile": click.option(
        "--profile",
        default="auto",
        help="File of rotary profile to fill the slots with; auto is the one beside the model; off is none.",
    ),
}
_NO_PREFETCH = click.option(
    "--no-prefetch", is_flag=True, help="Do not prefetch what the next layers may want."
)


def paging(command: Command) -> Command:
    """Give a command the options of paging, and `config` made of them: a `RotaryConfig`, None if off."""

    @functools.wraps(command)
    def configured(*, no_prefetch: bool, **given: Any) -> Any:
        fields = {name: given.pop(name) for name in _PAGING}
        if no_prefetch:
            fields["prefetch"] = False
        config = RotaryConfig.from_any({**fields, "verbose": not given.get("as_json")})
        return command(config=config, **given)

    return _with((*_PAGING.values(), _NO_PREFETCH), configured)


def generation(command: Command) -> Command:
    """Give a command the options of making text: n_predict, temp, seed, n_ctx and n_threads."""
    return _with(
        (
            click.option(
                "-n",
                "--n-predict",
                default=128,
                type=click.IntRange(min=0),
                help="Tokens to generate for a prompt.",
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
                help="CPU threads.  [default: half of the CPUs that may be used; all for the prompt]",
            ),
        ),
        command,
    )


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
