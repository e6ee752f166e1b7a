# SPDX-License-Identifier: MIT
"""The style of all figures: colours that can be told apart, labels that do not overlap, equal bytes."""

from __future__ import annotations

import itertools
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from rotary_llamacpp.display import drawing
from rotary_llamacpp.display.drawing import (
    GRID,
    INK,
    LINES,
    MUTED,
    PAPER,
    apart,
    axes,
    label_lines,
    styled,
    svg,
)
from rotary_llamacpp.errors import RotaryError
from tests.support import ROOT

# Eyes without the cones for long, medium or short waves, in linear RGB: Machado, Oliveira and Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1.0.
EYES = {
    "normal": np.eye(3),
    "protanopic": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopic": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopic": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of sRGB
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(float(XYZ[1] @ linear(colour)) + 0.05 for colour in (one, other))
    return high / low


def lab(rgb):
    found = XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(found > 0.008856, np.cbrt(found), 7.787 * found + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(page):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for pair in (INK, MUTED, *LINES):
        assert contrast(pair[page], PAPER[page]) >= 4.5, pair
    assert contrast(GRID[page], PAPER[page]) < 2, "the grid stays behind"
    for eye, seen in EYES.items():
        for one, other in itertools.combinations((pair[page] for pair in LINES), 2):
            distance = np.linalg.norm(lab(seen @ linear(one)) - lab(seen @ linear(other)))
            assert distance >= 30, (eye, one, other)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([50, 20], [50, 20]),  # far enough
        ([50, 51, 49], [50, 60, 40]),  # around the middle, in their order
        ([99, 98], [95, 85]),  # against the top
        ([1, 2], [5, 15]),  # against the bottom
        ([], []),
        ([30], [30]),
    ],
)
def test_labels_move_apart(wanted, expected):
    assert apart(wanted, [10] * len(wanted), 0, 100) == pytest.approx(expected)


def test_labels_without_room_keep_their_order():
    found = apart([5, 4, 3, 2], [10] * 4, 0, 20)
    assert found == sorted(found, reverse=True) and np.diff(found).max() <= -10


def drawn():
    with styled():
        made = axes(xlabel="memory, GiB", ylabel="tokens/s", title="a title")
        for number in range(7):  # more than there are colours
            made.plot([0, 1], [0, 1 + number / 100], label=f"line {number} has a label of two lines")
        label_lines(made)
        return svg(made)


def test_equal_figures_are_equal_bytes_whatever_the_user_has_set(monkeypatch):
    import matplotlib

    first = drawn()
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert drawn() == first
        assert matplotlib.rcParams["font.size"] == 30.0, "the user's are back"
    assert not re.search(r"\d\d:\d\d:\d\d", first) and "<metadata" not in first


def colours(text):
    return set(re.findall(r"(?:fill|stroke): (#\w+)", re.sub(r"(?s)<style>.*?</style>", "", text)))


def test_every_colour_has_its_dark_one():
    found = drawn()
    pairs = dict((PAPER, INK, MUTED, GRID, *LINES))
    assert PAPER[0] in colours(found) and {light for light, _ in LINES} <= colours(found) <= set(pairs)
    rules = re.findall(r'\[style\*="(fill|stroke): (#\w+)"\] \{ (\w+): (#\w+) !important \}', found)
    assert {(what, light): dark for what, light, _, dark in rules} == {
        (what, light): dark for what in ("fill", "stroke") for light, dark in pairs.items()
    }
    assert all(what == changed for what, _, changed, _ in rules)
    assert found.index("prefers-color-scheme: dark") < found.index("style*=")


def test_labels_stand_beside_their_lines_and_not_on_each_other():
    page = ElementTree.fromstring(drawn())
    texts = [each for each in page.iter("{http://www.w3.org/2000/svg}text") if "label" in (each.text or "")]
    heights = [float(re.search(r"translate\(\S+ (\S+)\)|y=", each.get("transform"))[1]) for each in texts]
    assert [each.text[:6] for each in texts] == [f"line {number}" for number in range(7)]
    assert max(np.diff(heights)) < -20, "two lines each, the first at the bottom"


def test_a_missing_package_has_a_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RotaryError, match=r"^matplotlib: cannot be imported"), drawing.styled():
        pass


def outside(text):
    """What an SVG would load from elsewhere: all but names of namespaces, and references into itself."""
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    return re.findall(r"https?:|<!DOCTYPE|<!ENTITY|@import|@font-face|href=\"(?!#)|url\((?!#)", text)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_committed_figures_load_nothing_from_elsewhere(path):
    text = path.read_text()
    assert ElementTree.fromstring(text).get("viewBox")
    assert not outside(text)


def test_that_it_would_be_noticed():
    assert not outside(drawn())
    assert outside('<style>@font-face { src: url("https://a/b.woff2") }</style>')
    assert outside('<image href="picture.png"/>') and not outside('<use href="#a" clip-path="url(#b)"/>')
