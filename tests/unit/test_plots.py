# SPDX-License-Identifier: MIT
"""Figures of benchmarks: from a small file of beyond_ram.py's, and a recorded terminal."""

from __future__ import annotations

import io
import json
import re
import sys
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.live import Live
from rich.text import Text

from benchmarks import live_svg, plots, report
from benchmarks.cells import Variant
from benchmarks.common import provenance
from rotary_llamacpp.display.panel import Tail, View, frame
from rotary_llamacpp.pinned import LLAMA_CPP_PYTHON
from tests.support import ROOT
from tests.unit.test_benchmarks import IN_MEMORY, LIMITED, everything, failed, run
from tests.unit.test_drawing import colours, outside


def figures(*limited):
    """A file of beyond_ram.py's with these runs at the limit of 60 %."""
    reference = run(IN_MEMORY, Variant("stock"), 44.0), run(IN_MEMORY, Variant("rotary"), 45.5)
    found = everything([*reference, *limited])
    found["machine"]["memory_bytes"] = 24 * 2**30
    found["settings"]["quick"] = False
    found |= {"date": "2026-11-22", "commit": "0c1e57098b", "llama_cpp_python": "0.3.36"}
    found["shapes"] = {"q4_0": {"n_layer": 12, "n_expert": 128, "n_expert_used": 8}}
    found["rows"] = report.rows(found)
    return found


BOTH = run(LIMITED, Variant("stock", False), 12.6), run(LIMITED, Variant("rotary"), 28.5)


def words(text):
    return [each.text for each in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def plot(tmp_path):
    """Runs plots.py on figures; the result, and the SVG if it was written."""

    def make(content, *arguments):
        source, out = tmp_path / "figures.json", tmp_path / "out.svg"
        source.write_text(content if isinstance(content, str) else json.dumps(content))
        out.unlink(missing_ok=True)
        ran = CliRunner().invoke(plots.main, [str(source), "-o", str(out), *arguments])
        return ran, out.read_text() if out.exists() else None

    return make


def test_a_figure_of_decode_over_memory(plot):
    ran, text = plot(figures(*BOTH))
    assert ran.exit_code == 0, ran.output
    found = words(text)
    assert "memory limit, GiB and % of the model" in found and "tokens per second" in found
    assert {"stock's best 12.6", "Rotary 28.5"} <= set(found)
    assert "in memory: stock's best 44.0, Rotary 45.5" in found
    assert "Q4_0, slow disk of 0.49 GiB/s" in found
    assert {"0.586", "60%", "0.977", "model"} <= set(found), "1000 MiB, and 60 % of them"
    about = " ".join(found)
    for said in ("a CPU, 2 threads, 24 GiB", "8 of 128 experts", "commit 0c1e57098b, 2026-11-22", "0.3.36"):
        assert said in about, about
    assert "smoke" not in about
    assert not outside(text) and plot(figures(*BOTH))[1] == text
    paper, ink = "#ffffff", "#1f2328"
    assert {paper, ink} <= colours(text)


def test_each_point_is_where_its_speed_is(plot):
    _, text = plot(figures(*BOTH))
    texts = ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
    heights = {each.text: float(each.get("y")) for each in texts if each.get("y")}
    zero, forty = heights["0"], heights["40"]
    at = {name: (zero - heights[name]) / (zero - forty) * 40 for name in ("stock's best 12.6", "Rotary 28.5")}
    assert list(at.values()) == pytest.approx([12.6, 28.5], abs=0.5)


def test_what_never_finished_is_said(plot):
    ran, text = plot(figures(failed(LIMITED, Variant("stock"), "killed"), BOTH[1]))
    assert ran.exit_code == 0, ran.output
    found = words(text)
    assert "none finished" in found and "Rotary 28.5" in found and "stock's best:" in found


def test_a_smoke_run_says_so(plot):
    quick = figures(*BOTH)
    quick["settings"]["quick"] = True
    assert "mean nothing" in " ".join(words(plot(quick)[1]))


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        ("{", (), "cannot be read"),
        ("[1]", (), "has no date, commit"),
        (
            {"date": 1, "rows": []},
            (),
            "has no commit, llama_cpp_python, machine, shapes, runs; write it anew",
        ),
        (figures(*BOTH), ("--routing", "random"), "no figures of routing 'random'"),
        (figures(*BOTH), ("--disks", "fast"), "types any, disks fast; choose among those measured"),
        (figures(*BOTH), ("--types", "q8_0"), "types q8_0, disks any"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(plot, content, arguments, says):
    ran, text = plot(content, *arguments)
    assert ran.exit_code == 1 and text is None
    assert says in ran.output and ran.output.count("\n") == 1, ran.output


def test_provenance():
    found = provenance()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and found["llama_cpp_python"] == LLAMA_CPP_PYTHON
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{10}\+?", found["commit"])


# ---- the recorded terminal


class Made:
    """Figures of a model that is not paged: the shortest panel."""

    stats = {"active": False, "reason": "of a test", "notices": []}  # noqa: RUF012

    def last(self):
        return None

    window = last


def written(*n_made):
    """What the panel writes to a terminal that shows these numbers of tokens of 100, one after another."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=80, height=30)
    tail = Tail()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for number in n_made:
            tail.add(f"word{number} ")
            view = View("tokens", 1.0, number / 100, f"{number} of 100", 5.0, 4.0, "a.gguf", Made())
            live.update(Text("\n").join(frame(view, tail, 80, 29)), refresh=True)
    return "rotary: a message before\r\n" + out.getvalue().replace("\n", "\r\n") + "the text\r\n"


def test_the_last_frame_is_found():
    found = live_svg.last_frame(written(10, 50, 90))
    lines = found.plain.splitlines()
    assert lines[0].startswith("── rotary a.gguf ──") and lines[-1].startswith("Ctrl-C")
    assert "90 of 100" in lines[1] and "50 of 100" not in found.plain
    assert any("word10 word50 word90" in line for line in lines) and "before" not in found.plain
    assert any(span.style.color for span in found.spans), "with its colours"


@pytest.mark.parametrize(
    ("frames", "says"),
    [((10, 79), "of 79 of 100 tokens, less than 80%"), ((), "no frame of generated tokens")],
)
def test_a_frame_far_from_the_end_is_refused(frames, says):
    with pytest.raises(click.ClickException, match=says):
        live_svg.last_frame(written(*frames))


def test_the_terminal_as_svg():
    text = live_svg.render("rotary run a.gguf --live", live_svg.last_frame(written(90)))
    found = " ".join(words(text)).replace("\xa0", " ")
    assert "$ rotary run a.gguf --live" in found and "90 of 100" in found and "word90" in found
    assert not outside(text) and "Fira" not in text
    assert text == live_svg.render("rotary run a.gguf --live", live_svg.last_frame(written(90)))


def test_a_command_runs_on_a_terminal_of_its_own():
    code = "import os, sys; print(sys.stdout.isatty(), *os.get_terminal_size(2), os.getcwd())"
    assert live_svg.record([sys.executable, "-c", code]) == f"True 80 30 {ROOT}\r\n"
    with pytest.raises(click.ClickException, match=r"status 3: the reason"):
        live_svg.record([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])
