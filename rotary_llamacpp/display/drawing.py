# SPDX-License-Identifier: MIT
"""Draws figures with matplotlib, as SVG. Imports matplotlib, an optional package, only to draw."""

from __future__ import annotations

import io
from typing import Any

from ..errors import RotaryError

EXTRA = "install it with `pip install 'rotary-llamacpp[report]'`"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rotary",
    "font.family": "sans-serif",
    "font.size": 9.0,
}


def axes(width: float = 8.0, height: float = 3.2, **texts: Any) -> Any:
    """Make axes in a new figure, `width` by `height` inches; `texts` are xlabel, ylabel and title.

    Raises
    ------
    RotaryError
        matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RotaryError(f"matplotlib: cannot be imported, {error}; {EXTRA}") from error
    with rc_context(_STYLE):
        drawn: Any = Figure((width, height), layout="constrained").subplots()
    drawn.set(**texts)
    drawn.spines[["top", "right"]].set_visible(False)
    return drawn


def svg(drawn: Any) -> str:
    """Render the figure of some axes as SVG; text stays text, and nothing differs between runs."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(_STYLE):
        drawn.get_figure().savefig(
            out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return out.getvalue()
