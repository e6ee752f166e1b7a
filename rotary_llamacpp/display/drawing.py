# SPDX-License-Identifier: MIT
"""Draws figures with matplotlib as SVG, all in one style. Imports matplotlib, an extra, only to draw.

A figure has a light and a dark look, and a browser takes that of the page around it; programs that know only
one show the light one. It has its own background in both, so that it can be read on any page. Equal figures
are equal bytes: neither date, nor random names, nor the user's own settings of matplotlib are in them.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from ..errors import RotaryError

EXTRA = "install it with `pip install 'rotary-llamacpp[report]'`"

# Colours are pairs, on a light and on a dark background. Text and lines have a contrast of 4.5 or more (WCAG
# 2.2) against it; lines differ by 30 or more in CIELAB, also to deuteranopic, protanopic and tritanopic eyes.
PAPER = ("#ffffff", "#0d1117")
INK = ("#1f2328", "#e6edf3")
MUTED = ("#59636e", "#9198a1")
GRID = ("#d1d9e0", "#30363d")
LINES = (
    ("#0077b3", "#58b4f0"),
    ("#cc4400", "#f0883e"),
    ("#9933ff", "#a64dff"),
    ("#001580", "#f5daa3"),
    ("#52141f", "#ff0080"),
)
_FONT_POINTS = 9.0
_LABEL_COLUMNS = 26
_LINE_SPACING = 1.25


def _settings() -> dict[str, Any]:
    from matplotlib.rcsetup import cycler

    colours = cycler(color=[light for light, _ in LINES])
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "rotary",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "font.size": _FONT_POINTS,
        "figure.facecolor": PAPER[0],
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED[0],
        "axes.labelcolor": INK[0],
        "axes.titlecolor": INK[0],
        "axes.titlesize": _FONT_POINTS + 1,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(linestyle=["-", "--"]) * colours,
        "grid.color": GRID[0],
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.0,
        "text.color": INK[0],
        "xtick.color": MUTED[0],
        "ytick.color": MUTED[0],
        "legend.frameon": False,
    }


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in the project's style, whatever the user's own settings of matplotlib are.

    All that draws a figure and `svg` belong inside.

    Raises
    ------
    RotaryError
        matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise RotaryError(f"matplotlib: cannot be imported, {error}; {EXTRA}") from error
    with style.context(["default", _settings()]):
        yield


def axes(width: float = 8.0, height: float = 3.2, **texts: Any) -> Any:
    """Make the axes of a new figure.

    Parameters
    ----------
    width, height : float
        Size of the figure in inches. At 8 inches wide its text is as large as a page's.
    texts
        xlabel, ylabel, title and other properties of the axes.
    """
    drawn = figure(width, height).subplots()
    drawn.set(**texts)
    return drawn


def figure(width: float, height: float) -> Any:
    """Make an empty figure, of a size in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def headline(whole: Any, title: str, about: Sequence[str]) -> None:
    """Write a title above a figure, and below it what the figure is about; long lines are broken."""
    width, height = (72 * inches for inches in whole.get_size_inches())
    lines = [(title, INK[0], "bold", _FONT_POINTS + 2)]
    n_columns = int(width / (0.56 * _FONT_POINTS))  # of DejaVu Sans; most other fonts are narrower
    for text in about:
        lines += [(line, MUTED[0], "normal", _FONT_POINTS) for line in textwrap.wrap(text, n_columns)]
    down = 4.0
    for text, colour, weight, points in lines:
        whole.text(4 / width, 1 - down / height, text, va="top", color=colour, weight=weight, fontsize=points)
        down += 1.4 * points
    whole.get_layout_engine().set(rect=(0, 0, 1, 1 - (down + 2) / height))


def label_lines(drawn: Any) -> None:
    """Write each line's label at its right end, in its colour.

    Labels that would overlap move apart. Where one has moved, or colours repeat, a piece of each line leads
    to its label.
    """
    whole = drawn.get_figure()
    whole.draw_without_rendering()  # now the scales and the height of the axes are known
    lines = [line for line in drawn.get_lines() if not line.get_label().startswith("_")]
    points = 72 / whole.dpi
    ends = [drawn.transData.transform(line.get_xydata()[-1])[1] * points for line in lines]
    texts = [
        "\n".join(textwrap.fill(part, _LABEL_COLUMNS) for part in line.get_label().splitlines())
        for line in lines
    ]
    heights = [_FONT_POINTS * _LINE_SPACING * (1 + text.count("\n")) for text in texts]
    box = drawn.get_window_extent()
    moved = [
        to - end for end, to in zip(ends, apart(ends, heights, box.y0 * points, box.y1 * points), strict=True)
    ]
    lead = len(lines) > len(LINES) or max(map(abs, moved), default=0) > _FONT_POINTS
    for line, text, up in zip(lines, texts, moved, strict=True):
        leader = {
            "arrowstyle": "-", "color": line.get_color(), "linestyle": line.get_linestyle(),
            "linewidth": 1, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0,
        }  # fmt: skip
        drawn.annotate(
            text, line.get_xydata()[-1], (24 if lead else 7, up), textcoords="offset points", va="center",
            color=line.get_color(), annotation_clip=False, linespacing=_LINE_SPACING,
            arrowprops=leader if lead else None,
        )  # fmt: skip


def apart(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Middles for labels of these heights, none over another, as near as can be to those wanted.

    Near is by least squares. Labels keep their order. They stay between `low` and `high`; without room for
    that, they reach above.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    offsets = [0.0]  # of labels stacked without gaps; less these, middles need only not to fall
    for below, above in pairwise(order):
        offsets.append(offsets[-1] + (heights[below] + heights[above]) / 2)
    blocks: list[list[float]] = []  # isotonic regression: pool adjacent violators
    for i, offset in zip(order, offsets, strict=True):
        blocks.append([wanted[i] - offset])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    bottom = low + heights[order[0]] / 2
    top = max(bottom, high - heights[order[-1]] / 2 - offsets[-1])
    middles = [min(max(fmean(block), bottom), top) for block in blocks for _ in block]
    placed = dict(zip(order, map(sum, zip(middles, offsets, strict=True)), strict=True))
    return [placed[i] for i in range(len(wanted))]


def svg(drawn: Any) -> str:
    """Render the figure of some axes as SVG that refers to nothing outside of it, with text as text."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawn.get_figure().savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    head, body = text[text.index("<svg") :].split("<defs>", 1)  # without the DTD's address
    return f"{head}<defs>\n  <style>\n{_dark_rules()}  </style>{body}"


def _dark_rules() -> str:
    """Rules of CSS that replace each light colour by its dark one, in fills and in strokes."""
    rules = "".join(
        f'    [style*="{what}: {light}"] {{ {what}: {dark} !important }}\n'
        for light, dark in (PAPER, INK, MUTED, GRID, *LINES)
        for what in ("fill", "stroke")
    )
    return f"   @media (prefers-color-scheme: dark) {{\n{rules}   }}\n"
