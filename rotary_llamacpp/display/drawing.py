# SPDX-License-Identifier: MIT
"""Draws lines in SVG, for pages and for separate files."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

COLOURS = ("#3060c0", "#c04030", "#208040", "#8050b0", "#b07010", "#108090", "#905060", "#404040")
WIDTH, LEFT = 640, 48
_HEIGHT, _BOTTOM = 260, 36

Lines = dict[str, list[tuple[float, float]]]


def plot(lines: Lines, what: str, marks: bool = False, ends: Sequence[float] = ()) -> str:
    """Lines over 0 to 100 % of y, and their key, for a page."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(lines)}
    return key(colours) + svg(_drawn(lines, what, colours, 100.0, " %", marks, ends), _HEIGHT + 10)


def standalone(lines: Lines, title: str, what: str) -> str:
    """A file of its own: lines over y from 0 to their highest, with the title and the key in it."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(lines)}
    top = max(y for points in lines.values() for _, y in points)
    top = _step(top) * math.ceil(top / _step(top))
    parts = [f'<text x="{LEFT}" y="18" font-weight="600">{html.escape(title)}</text>']
    for i, (name, colour) in enumerate(colours.items()):
        y = 38 + 17 * i
        parts.append(f'<path d="M{LEFT} {y - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{LEFT + 26}" y="{y}">{html.escape(name)}</text>')
    down = 34 + 17 * len(colours)
    drawn = _drawn(lines, what, colours, top, "", marks=True, ends=())
    height, width = down + _HEIGHT + 14, LEFT + WIDTH + 70
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}'
        f'<g transform="translate(0 {down})">{drawn}</g></svg>\n'
    )


def _drawn(
    lines: Lines, what: str, colours: dict[str, str], top: float, unit: str, marks: bool,
    ends: Sequence[float],
) -> str:  # fmt: skip
    right = max(x for points in lines.values() for x, _ in points)
    drawn = []

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + WIDTH * x / right, (_HEIGHT - _BOTTOM) * (1 - y / top) + 6

    for i in range(5):
        y = top * i / 4
        _, height = at(0, y)
        drawn.append(
            f'<path d="M{LEFT} {height:.1f}H{LEFT + WIDTH}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}{unit}</text>'
        )
    step = _step(right)
    for x in np.arange(0, right + step / 100, step):
        across, down = at(float(x), 0)
        drawn.append(f'<text x="{across:.1f}" y="{down + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for end in ends:
        across, down = at(end, 0)
        drawn.append(f'<path d="M{across:.1f} 6V{down:.1f}" stroke="#888" stroke-dasharray="3 3"/>')
    for name, points in lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.6"/>')
        for point in points if marks else ():
            across, down = at(*point)
            drawn.append(
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colours[name]}">'
                f"<title>{html.escape(name)}, {point[0]:.4g}: {point[1]:.1f}{unit}</title></circle>"
            )
    drawn.append(f'<text x="{LEFT + WIDTH}" y="{_HEIGHT + 4}" text-anchor="end">{html.escape(what)}</text>')
    return "".join(drawn)


def _step(top: float) -> float:
    """A round distance that goes two to six times into `top`."""
    step = 10.0 ** math.floor(math.log10(top / 2))
    return step * next(factor for factor in (1, 2, 2.5, 5, 10) if top / (step * factor) <= 6)


def key(colours: dict[str, str]) -> str:
    """Names and colours, for a page."""
    items = (
        f'<span><b style="background:{colour}"></b>{html.escape(name)}</span>'
        for name, colour in colours.items()
    )
    return f'<div class="key">{"".join(items)}</div>'


def svg(content: str, height: float) -> str:
    """A figure for a page."""
    width = LEFT + WIDTH + 70
    return f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}">{content}</svg>'
