# SPDX-License-Identifier: MIT
"""Makes one self-contained HTML page about a routing trace, for ``rotary report``."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RotaryError
from ..host.files import writing
from ..policies import NATIVE
from ..predictors import NAMES
from ..simulation.comparison import check_names, compare_trace
from ..simulation.replays import Link, misses_of, slots_for
from ..traces.archive import DECODE, Trace, load
from ..units import MIB, parse_rate, percent, ratio
from .drawing import COLOURS, LEFT, WIDTH, key, plot, svg

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } p { max-width: 46rem; }
svg { display: block; max-width: 100%; height: auto; } svg text { font-size: 12px; fill: #444; }
table { border-collapse: collapse; } th, td { padding: .15rem .7rem; text-align: right; }
th { border-bottom: 1px solid #888; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
.key { margin: .3rem 0; } .key span { margin-right: 1.1rem; white-space: nowrap; }
.key b { display: inline-block; width: 1.1rem; height: .25rem; margin-right: .35rem; vertical-align: middle; }
"""


def report(
    trace: Trace,
    policies: Sequence[str],
    budgets: Sequence[float],
    link: Link,
    predictors: Sequence[str],
    depth: int = 1,
) -> str:
    """Make the page.

    Parameters
    ----------
    budgets : list of float
        Shares of all experts; details are for the one in the middle.
    link : Link
        Link for estimates of time.
    predictors : list of str
        Names of `rotary_llamacpp.predictors.NAMES`.
    """
    rows = compare_trace(trace, policies, budgets, None)
    share = sorted(budgets)[len(budgets) // 2]
    timed = compare_trace(trace, [policies[-1]], [share], link, ["none", *predictors], depth)
    sizes = sorted({f"{n_bytes / MIB:.2f}" for n_bytes in trace.expert_bytes.values()}, key=float)
    name = html.escape(str(trace.about.get("model", "a model")).rsplit("/", 1)[-1])
    n_decoded = trace.tokens(DECODE)
    parts = [
        f"<h1>Routing of {name}</h1>",
        f"<p>{trace.tokens()} tokens, {n_decoded} of them decoded, in {len(trace.layers)} layers; "
        f"{trace.experts.shape[1]} of {trace.n_expert} experts a token and layer; an expert is "
        f"{' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} MiB.</p>",
        "<h2>Which experts are chosen</h2>",
        "<p>One row a layer, one column an expert, sorted by how often the layer chose it: the more colour "
        "is at the left, the more a cache can hold.</p>",
        _heat_map(trace),
        "<h2>Policies by budget</h2>",
        "<p>Share of requests in decode whose expert was resident. Belady's optimum knows the future.</p>",
        _curves(rows),
        f"<h2>Hit rate over time, {100 * share:g} %</h2>",
        "<p>All layers, mean of the last 16 tokens; a dashed line is the end of a prompt.</p>",
        _over_time(trace, policies, share),
        f"<h2>Prefetch, {100 * share:g} %, {html.escape(policies[-1])}</h2>",
        f"<p>Simulated: a link of {link.bytes_per_us / 1000:g} GB/s, {link.compute_us / 1000:g} ms of "
        f"computing a token, {depth} layers ahead. Accuracy: share of prefetched experts that were used; "
        "coverage: share of misses that were prefetched; in time: share of those that were complete.</p>",
        _prefetch(timed),
        "<h2>Where the time goes</h2>",
        _times(timed, link),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Routing of {name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def write_report(
    trace_file: str, output: str, policies: list[str], budgets: list[float], link: str, compute_us: float,
    depth: int,
) -> None:  # fmt: skip
    """Check names, and write the page of a trace."""
    check_names("policy", policies, NATIVE)
    medium = Link(parse_rate(link), compute_us)
    trace = load(trace_file)
    if trace.tokens(DECODE) == 0:
        raise RotaryError(f"{trace_file}: nothing was decoded in it; record one with -n")
    page = report(trace, policies, budgets, medium, list(NAMES), depth)
    with writing(output) as file:
        file.write(page.encode())


# ---- figures


def _heat_map(trace: Trace) -> str:
    decode = trace.phase == DECODE
    rows = decode if decode.any() else np.ones(len(decode), bool)
    width, height = WIDTH / trace.n_expert, max(4.0, min(14.0, 300 / len(trace.layers)))
    cells = []
    for y, layer in enumerate(trace.layers):
        of_layer = trace.experts[rows & (trace.layer == layer)]
        count = np.bincount(of_layer[of_layer >= 0], minlength=trace.n_expert) / max(len(of_layer), 1)
        for x, expert in enumerate(np.argsort(-count, kind="stable").tolist()):
            if count[expert] > 0:
                shade = int(255 - 235 * min(1.0, count[expert] ** 0.5))
                cells.append(
                    f'<rect x="{LEFT + x * width:.2f}" y="{y * height:.1f}" width="{width:.2f}" '
                    f'height="{height:.1f}" fill="rgb({shade},{shade},255)">'
                    f"<title>layer {layer}, expert {expert}: {percent(count[expert])} of tokens</title>"
                    "</rect>"
                )
    total = height * len(trace.layers)
    labels = (
        f'<text x="{LEFT - 6}" y="{height:.0f}" text-anchor="end">{trace.layers[0]}</text>'
        f'<text x="{LEFT - 6}" y="{total:.0f}" text-anchor="end">{trace.layers[-1]}</text>'
        f'<text x="{LEFT}" y="{total + 16:.0f}">most often</text>'
        f'<text x="{LEFT + WIDTH}" y="{total + 16:.0f}" text-anchor="end">least</text>'
    )
    return svg("".join(cells) + labels, total + 22)


def _curves(rows: list[dict[str, Any]]) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["policy"], []).append((100 * row["budget"], 100 * (row["hit_rate"] or 0)))
    return plot({name: sorted(points) for name, points in lines.items()}, "% of the experts", marks=True)


def _over_time(trace: Trace, policies: Sequence[str], share: float) -> str:
    window = 16
    tokens = np.cumsum(np.concatenate([[True], (np.diff(trace.step) != 0) | (np.diff(trace.sequence) != 0)]))
    requests = np.bincount(tokens, (trace.experts >= 0).sum(axis=1))[1:]
    lines = {}
    for policy in policies:
        misses = np.bincount(tokens, misses_of(trace, policy, slots_for(trace, share)))[1:]
        rate = 100 * (1 - _window(misses, window) / _window(requests, window))
        at = np.unique(np.linspace(0, len(rate) - 1, 400).astype(int))
        lines[policy] = [(float(i + 1), float(rate[i])) for i in at]
    first = np.concatenate([[True], np.diff(tokens) > 0])
    ends = np.flatnonzero(np.diff(trace.phase[first].astype(int)) == 1) + 1
    return plot(lines, "tokens", ends=[float(end) for end in ends])


def _window(values: NDArray[Any], n: int) -> NDArray[Any]:
    total = np.concatenate([np.zeros(n), np.cumsum(values)])
    return total[n:] - total[:-n]


def _prefetch(rows: list[dict[str, Any]]) -> str:
    head = ["prefetch", "accuracy", "coverage", "in time", "hit rate", "of bytes", "tok/s"]
    body = []
    for row in rows:
        if row["policy"] == "belady":
            continue
        used, prefetched = row["prefetch_used"], row["prefetched"]
        missed = row["misses"] + used - row["late_hits"]
        body.append(
            [
                row["predictor"],
                percent(ratio(used, prefetched)),
                percent(used / missed if prefetched and missed else None),
                percent(1 - row["late_hits"] / used if used else None),
                percent(row["hit_rate"]),
                percent(row["byte_hit_rate"]),
                f"{row['tokens_per_second']:.1f}",
            ]
        )
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) + "</tr>" for line in body
    )
    return "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + f"</tr>{cells}</table>"


def _times(rows: list[dict[str, Any]], link: Link) -> str:
    rows = [row for row in rows if row["policy"] != "belady"]
    most = max(link.compute_us + row["stall_us"] for row in rows)
    bars = []
    for i, row in enumerate(rows):
        y = 4 + 26 * i
        computing = (WIDTH - 120) * link.compute_us / most
        waiting = (WIDTH - 120) * row["stall_us"] / most
        bars.append(
            f'<text x="{LEFT + 70}" y="{y + 14}" text-anchor="end">{html.escape(row["predictor"])}</text>'
            f'<rect x="{LEFT + 80}" y="{y}" width="{computing:.1f}" height="18" fill="{COLOURS[0]}"/>'
            f'<rect x="{LEFT + 80 + computing:.1f}" y="{y}" width="{waiting:.1f}" height="18" '
            f'fill="{COLOURS[1]}"/><text x="{LEFT + 86 + computing + waiting:.1f}" y="{y + 14}">'
            f"{(link.compute_us + row['stall_us']) / 1000:.2f} ms</text>"
        )
    legend = key({"computing": COLOURS[0], "waiting for experts": COLOURS[1]})
    return f"<p>Time of a token, by predictor.</p>{legend}" + svg("".join(bars), 8 + 26 * len(rows))
