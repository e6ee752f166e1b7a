# SPDX-License-Identifier: MIT
"""Makes one self-contained HTML page about a routing trace, for ``rotary report``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RotaryError
from ..host.files import writing
from ..policies import NATIVE
from ..predictors import NAMES
from ..simulation import Link, misses_of, slots_for
from ..simulation.comparison import check_names, compare_trace
from ..traces import DECODE, Trace, load
from ..units import MIB, decimal, parse_rate, percent, ratio
from .drawing import EXTRA, INK, MUTED, PAPER, axes, label_lines, styled, svg

_WINDOW = 16  # tokens


def write_report(
    trace_file: str, output: str, policies: list[str], budgets: list[float], link: str, compute_us: float,
    depth: int,
) -> None:  # fmt: skip
    """Check the names, and write the HTML page about a trace."""
    check_names("policy", policies, NATIVE)
    medium = Link(parse_rate(link), compute_us)
    trace = load(trace_file)
    if trace.tokens(DECODE) == 0:
        raise RotaryError(f"{trace_file}: has no decoded tokens; record a trace with -n above 0")
    page = report(trace, policies, budgets, medium, list(NAMES), depth)
    with writing(output) as file:
        file.write(page.encode())


def report(
    trace: Trace,
    policies: Sequence[str],
    budgets: Sequence[float],
    link: Link,
    predictors: Sequence[str],
    depth: int = 1,
) -> str:
    """Make the HTML page about a trace.

    Parameters
    ----------
    budgets : list of float
        Shares of all experts; details are shown for the middle one.
    link : Link
        Link that times are estimated for.
    predictors : list of str
        Names of `rotary_llamacpp.predictors.NAMES`.

    Raises
    ------
    RotaryError
        jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment
        from markupsafe import Markup
    except ImportError as error:
        raise RotaryError(f"jinja2: cannot be imported, {error}; {EXTRA}") from error

    def figure(draw: Callable[..., Any], *of: Any) -> Any:
        with styled():
            return Markup(_inline(svg(draw(*of))))

    share = sorted(budgets)[len(budgets) // 2]
    popularity = figure(_popularity, trace)  # first, so that a missing matplotlib is noticed early
    timed = compare_trace(trace, [policies[-1]], [share], link, ["none", *predictors], depth)
    timed = [row for row in timed if row["policy"] != "belady"]
    sizes = sorted({f"{n_bytes / MIB:.2f}" for n_bytes in trace.expert_bytes.values()}, key=float)
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    page: str = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            name=str(trace.about.get("model", "a model")).rsplit("/", 1)[-1],
            ink=INK,
            paper=PAPER,
            trace=trace,
            n_decoded=trace.tokens(DECODE),
            sizes=" to ".join(dict.fromkeys((sizes[0], sizes[-1]))),
            share=f"{100 * share:g}",
            policy=policies[-1],
            link=link,
            depth=depth,
            popularity=popularity,
            policies=figure(_by_budget, compare_trace(trace, policies, budgets, None)),
            over_time=figure(_over_time, trace, policies, share),
            prefetch=[_prefetch(row) for row in timed],
            times=figure(_times, timed, link),
        )
    )
    return page


def _inline(figure: str) -> str:
    """Strip what SVG inside HTML does not need: the prolog, namespaces and xlink."""
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", figure[figure.index("<svg") :]).replace(
        "xlink:href", "href"
    )


# ---- figures


def _popularity(trace: Trace) -> Any:
    decode = trace.phase == DECODE
    rows = decode if decode.any() else np.ones(len(decode), bool)
    shares = []
    for layer in trace.layers:
        chosen = trace.experts[rows & (trace.layer == layer)]
        count = np.bincount(chosen[chosen >= 0], minlength=trace.n_expert)
        shares.append(-np.sort(-100 * count / max(len(chosen), 1)))
    drawn = axes(xlabel="experts of the layer, most often chosen first", ylabel="layer")
    image = drawn.imshow(np.sqrt(shares), aspect="auto", cmap="cividis", interpolation="nearest")
    drawn.grid(visible=False)
    bar = drawn.get_figure().colorbar(image, label="chosen by, % of tokens")
    ticks = [tick for tick in bar.get_ticks() if tick <= bar.vmax]
    bar.set_ticks(ticks, labels=[f"{tick**2:.3g}" for tick in ticks])
    drawn.set_yticks([0, len(trace.layers) - 1], labels=[trace.layers[0], trace.layers[-1]])
    return drawn


def _by_budget(rows: Sequence[dict[str, Any]]) -> Any:
    drawn = axes(xlabel="budget, % of the experts", ylabel="hit rate, %", ylim=(0, 100))
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = sorted((row["budget"], row["hit_rate"] or 0) for row in rows if row["policy"] == policy)
        drawn.plot(*(100 * np.array(points)).T, marker="o", clip_on=False, label=policy)
    drawn.margins(x=0)
    label_lines(drawn)
    return drawn


def _over_time(trace: Trace, policies: Sequence[str], share: float) -> Any:
    tokens = np.cumsum(np.concatenate([[True], (np.diff(trace.step) != 0) | (np.diff(trace.sequence) != 0)]))
    requests = np.bincount(tokens, (trace.experts >= 0).sum(axis=1))[1:]
    drawn = axes(xlabel="tokens since the start of the trace", ylabel="hit rate, %", ylim=(0, 100))
    for policy in policies:
        misses = np.bincount(tokens, misses_of(trace, policy, slots_for(trace, share)))[1:]
        rate = 100 * (1 - _moving_sum(misses) / _moving_sum(requests))
        drawn.plot(np.arange(1, len(rate) + 1), rate, linewidth=1, label=policy)
    first = np.concatenate([[True], np.diff(tokens) > 0])
    for end in np.flatnonzero(np.diff(trace.phase[first].astype(int)) == 1) + 1:
        drawn.axvline(end, color=MUTED[0], linestyle=":", linewidth=1)
    drawn.margins(x=0)
    label_lines(drawn)
    return drawn


def _moving_sum(values: NDArray[Any]) -> NDArray[Any]:
    total = np.concatenate([np.zeros(_WINDOW), np.cumsum(values)])
    return total[_WINDOW:] - total[:-_WINDOW]


def _prefetch(row: dict[str, Any]) -> list[str]:
    """Cells of one predictor's row."""
    used, late, prefetched = row["prefetch_used"], row["late_hits"], row["prefetched"]
    missed = row["misses"] + used - late
    return [
        row["predictor"], percent(ratio(used, prefetched)),
        percent(ratio(used, missed) if prefetched else None), percent(ratio(used - late, used)),
        percent(row["hit_rate"]), percent(row["byte_hit_rate"]), decimal(row["tokens_per_second"]),
    ]  # fmt: skip


def _times(rows: Sequence[dict[str, Any]], link: Link) -> Any:
    names = [row["predictor"] for row in rows]
    computing, stall_ms = link.compute_us / 1000, [row["stall_us"] / 1000 for row in rows]
    drawn = axes(height=0.9 + 0.3 * len(rows), xlabel="time of one token, ms")
    drawn.grid(visible=False, axis="y")
    drawn.barh(names, computing, label="computing")
    bars = drawn.barh(names, stall_ms, left=computing, label="waiting for experts")
    drawn.bar_label(bars, [f"{computing + each:.2f} ms" for each in stall_ms], padding=3)
    drawn.margins(x=0.12)
    drawn.invert_yaxis()
    drawn.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return drawn
