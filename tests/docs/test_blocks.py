# SPDX-License-Identifier: MIT
"""Commands and Python that README.md and docs/ show run as they stand, and say what the pages show."""

from __future__ import annotations

import re

import pytest

from tests.docs import console, pages

PAGES = pages.every()
RUN = ("console", "python")
NOT_RUN = ("text", "json", "toml", "yaml", "ini", "csv", "c", "cpp", "diff", "mermaid", "shell")

# ```shell blocks are not run. What their commands begin with, and why not.
SHELL = {
    "pip install": "asks a package index, and compiles",
    "uv pip install": "asks a package index, and compiles",
    "pip wheel": "compiles",
    "python -m build": "compiles",
    "python -m venv": "is followed by what asks a package index",
    "source .venv/bin/activate": "is of the reader's environment",
    "git clone": "asks a server",
    "cd ": "is into what was cloned",
    "curl": "asks a server",
    "hf download": "asks a server",
    "make": "runs tests, or builds for minutes",
    "cmake": "builds for minutes",
    "sudo": "is for root",
    "llama-": "is a program of llama.cpp, which is not installed by ours",
    "export": "is for the command after it",
    "GGML_BACKEND_PATH=": "is for a program of llama.cpp",
    "python -m llama_cpp.server": "serves until it is stopped",
    "python benchmarks/": "measures for minutes",
    "python -m models.synth": "writes gigabytes",
    "rotary plan Qwen3-30B-A3B-Q4_K_M.gguf --measure": "measures for a quarter of a minute",
}
# What these commands print depends on the model and the options alone.
EVERYWHERE_EQUAL = r"rotary (info|convert)\b|rotary plan (?=.*--vram)(?=.*--ram )|rotary .*--help"


def test_fences_are_of_known_kinds():
    for page in PAGES:
        for block in page.fences:
            assert block.language in RUN + NOT_RUN, f"{page.name}:{block.line}: {block.language!r}"
            for line in console.commands(block) if block.language == "shell" else ():
                known = not line.strip() or line.startswith(("#", *SHELL))
                assert known, f"{page.name}:{block.line}: {line}: no reason in SHELL why it cannot be run"


def squeezed(text: str) -> str:
    return " ".join(text.split())


def check(page: pages.Page, ran: console.Ran) -> None:
    """The status is 0, or that of an error whose line is shown; output that can be known is as shown."""
    where = f"{page.name}:{ran.command.line}: $ {ran.command.text}"
    shown = squeezed("\n".join(ran.command.shown))
    if ran.status != 0:
        said = ran.err.strip().splitlines()[-1:] or [""]
        assert ran.status in (1, 2) and said[0] and squeezed(said[0]) in shown, (
            f"{where}: exit status {ran.status}; {ran.err[-2000:]}"
        )
        return
    model = console.TINY in ran.command.text or ".gguf" not in ran.command.text
    if model and re.match(EVERYWHERE_EQUAL, ran.command.text):
        rest = [[squeezed(line) for line in text.splitlines()] for text in (ran.out, ran.err)]
        for line in map(squeezed, ran.command.shown):
            if line not in ("", "..."):
                stream = next((lines for lines in rest if line in lines), None)
                assert stream is not None, f"{where}: does not print, or not there: {line}"
                del stream[: stream.index(line) + 1]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in RUN for block in page.fences)],
    ids=lambda page: page.name,
)  # fmt: skip
def test_blocks_run(page, native, tmp_path):
    environment = console.furnish(page, tmp_path)
    for ran in console.run_commands(page, tmp_path, environment):
        check(page, ran)
    if any(block.language == "python" for block in page.fences):
        done = console.run_python(page, tmp_path, environment)
        assert done.returncode == 0, done.stderr[-4000:]
