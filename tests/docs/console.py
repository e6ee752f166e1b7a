# SPDX-License-Identifier: MIT
"""Runs what pages show: the commands of a page's ```console blocks in one shell, its Python in one process.

The folder that they run in has what a reader at the root of a checkout has, as far as pages use it: the
committed model, also under each name of a large model that the page has, and `prompts.txt`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.docs.pages import Fence, Page
from tests.support import HANG_S, ROOT

TINY = "models/tiny-moe-q8_0.gguf"
PROMPTS = "In the beginning\nAnd the king said\nIt was a very fine day\n"

_ROTARY = """#!{python}
import sys
sys.path.insert(0, {root!r})
from rotary_llamacpp.__main__ import main
main()
"""
_PYTHON = """
import json, sys
blocks = json.load(sys.stdin)
names = {"__name__": "__main__"}
for page, line, text in blocks:
    exec(compile("\\n" * (line - 1) + text, page, "exec"), names)
"""


@dataclass
class Command:
    """A command as it is shown: behind ``$``, continued behind ``\\``, with the output below it."""

    line: int
    text: str
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    """What became of it."""

    command: Command
    status: int
    out: str
    err: str


def shown_commands(block: Fence) -> list[Command]:
    """The commands of a ```console block."""
    found: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if goes_on:
            found[-1].text += "\n" + line.removeprefix("> ")
        elif line.startswith("$ "):
            found.append(Command(number, line[2:]))
        else:
            assert found, f"line {number}: a console block begins with $"
            found[-1].shown.append(line)
            continue
        goes_on = line.endswith("\\")
    return found


def commands(block: Fence) -> list[str]:
    """The commands of a block, one string each: after ``$`` in a console, else every line."""
    if block.language == "console":
        return [re.sub(r"\\\n\s*", "", command.text) for command in shown_commands(block)]
    return re.sub(r"\\\n\s*", "", block.text).splitlines()


def _models(page: Page) -> set[str]:
    """Names of models that a page's commands and Python use and do not make."""
    texts = [block.text for block in page.fences if block.language in ("console", "python")]
    named = {name for text in texts for name in re.findall(r"[\w./-]+\.gguf\b", text)}
    lines = [line for block in page.fences if block.language == "console" for line in commands(block)]
    for line in lines:
        if match := re.search(r"\brotary convert ", line):
            models = [word for word in line[match.end() :].split() if word.endswith(".gguf")]
            made = set(models[1:2])
            named = {name for name in named if re.sub(r"-\d{5}-of-\d{5}", "", name) not in made}
    return {name for name in named if not name.startswith("/")}


def furnish(page: Page, folder: Path) -> dict[str, str]:
    """Put into a folder what the page's blocks need; return the environment to run them in."""
    for name in {TINY, *_models(page)}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / TINY)
    (folder / "prompts.txt").write_text(PROMPTS)
    programs = folder / ".programs"
    programs.mkdir()
    rotary = programs / "rotary"
    rotary.write_text(_ROTARY.format(python=sys.executable, root=str(ROOT)))
    rotary.chmod(0o755)
    for name in ("python", "python3"):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def run_commands(page: Page, folder: Path, environment: dict[str, str]) -> list[Ran]:
    """Run all commands of a page in one shell, one after another, whatever becomes of them."""
    shown = [each for block in page.fences if block.language == "console" for each in shown_commands(block)]
    results = folder / ".results"
    results.mkdir()
    script = []
    for i, command in enumerate(shown):
        at = shlex.quote(str(results / str(i)))
        # The status is there for an `echo $?` that follows.
        script.append(f"{{ {command.text}\n}} > {at}.out 2> {at}.err < /dev/null")
        script.append(f"status=$?; echo $status > {at}.status; (exit $status)")
    subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, timeout=HANG_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip

    def read(i: int, kind: str) -> str:
        path = results / f"{i}.{kind}"
        return path.read_text() if path.is_file() else ""

    return [
        Ran(command, int(read(i, "status") or -1), read(i, "out"), read(i, "err"))
        for i, command in enumerate(shown)
    ]


def run_python(page: Page, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run all Python blocks of a page in one process, with one namespace."""
    blocks: list[Any] = [
        (page.name, block.line, block.text) for block in page.fences if block.language == "python"
    ]
    return subprocess.run(
        [sys.executable, "-c", _PYTHON], cwd=folder, env=environment, input=json.dumps(blocks),
        capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
