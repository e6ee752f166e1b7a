# SPDX-License-Identifier: MIT
"""Rooms of the library and of the package: includes and imports point one way only."""

from __future__ import annotations

import ast
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import ROOT

# From the lowest: a room may use rooms of the rows before it, and of its own row if that makes no cycle.
NATIVE = (
    ("base",),
    ("stats", "cache"),
    ("store",),
    ("link",),
    ("model",),
    ("prefetch",),
    ("pool",),
    ("exec",),
    ("ggml",),
    ("capi",),
)
PYTHON = (  # modules of the top level are rooms of their own
    ("errors", "pinned", "policies"),
    ("units",),
    ("host",),
    ("gguf_files",),
    ("traces",),
    ("predictors",),
    ("config",),
    ("native",),
    ("simulation", "runtime", "conversion"),
    ("planning", "display"),
    ("cli",),
    ("__init__", "__main__"),
)
# External packages, and the only room that may import each.
ONLY_IN = {"cffi": "native", "llama_cpp": "native", "click": "cli"}

# A reference: the file that contains it, the line's number and text, and the file that it names.
Reference = tuple[Path, int, str, Path]


def includes(src: Path) -> Iterator[Reference]:
    """Each include of a file of the library, found as the compiler does: in native/src or the same folder."""
    for path in sorted(each for each in src.rglob("*") if each.is_file()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := re.match(r'\s*#\s*include\s*"(.+)"', line):
                found = src / match[1]
                if not found.is_file():
                    found = Path(os.path.normpath(path.parent / match[1]))
                if found.is_file():
                    yield path, number, line.strip(), found


def imports(package: Path) -> Iterator[tuple[Path, int, str, str]]:
    """Each import anywhere in a module, with the absolute name that it imports."""
    for path in sorted(package.rglob("*.py")):
        source = path.read_text()
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = parts[: len(parts) - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
            line = source.splitlines()[node.lineno - 1].strip() if names else ""
            yield from ((path, node.lineno, line, name) for name in names)


def own_imports(package: Path) -> Iterator[Reference]:
    """Each import of a module of the package."""
    for path, number, line, name in imports(package):
        head, *parts = name.split(".")
        while head == package.name:
            stem = package.joinpath(*parts)
            if files := [each for each in (stem / "__init__.py", stem.with_suffix(".py")) if each.is_file()]:
                yield path, number, line, files[0]
                break
            parts.pop()


def room(path: Path, top: Path) -> str:
    """The folder below `top` that contains a file, or the name of a module at the top level."""
    parts = path.relative_to(top).parts
    return parts[0] if len(parts) > 1 else path.stem if path.suffix == ".py" else ""


def cycle(edges: dict[Path | str, set[Path | str]]) -> list[Path | str]:
    """The nodes of a cycle, the first one repeated at the end; empty if there is none."""
    done: set[Path | str] = set()

    def walk(node: Path | str, way: list[Path | str]) -> list[Path | str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for other in sorted(edges.get(node, ()), key=str):
                if found := walk(other, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in edges if (found := walk(node, []))), [])


def violations(
    top: Path, rows: Sequence[Sequence[str]], references: Iterable[Reference], suffixes: str
) -> list[str]:
    """Violations, a line each: files outside of rooms, references in the wrong direction, cycles."""
    allowed = {name: set(itertools.chain(*rows[: i + 1])) for i, row in enumerate(rows) for name in row}
    there = {room(path, top) for path in top.rglob("*") if path.suffix in suffixes.split()}
    found = [f"{top / name}: no such room" for name in allowed if name not in there]
    for path in sorted(top.rglob("*")):
        if path.is_file() and path.suffix in suffixes.split() and room(path, top) not in allowed:
            found.append(f"{path}: in no room")
    rooms: dict[Path | str, set[Path | str]] = {}
    files: dict[Path | str, set[Path | str]] = {}
    lines = {}
    for path, number, line, other in references:
        source, target = room(path, top), room(other, top)
        where = f"{path}:{number}: {line}"
        if source != target and target not in allowed.get(source, set()):
            found.append(f"{where}: {source} may not depend on {target}")
            continue
        files.setdefault(path, set()).add(other)
        lines.setdefault((path, other), where)
        if source != target:
            rooms.setdefault(source, set()).add(target)
            lines.setdefault((source, target), where)
    for edges in (rooms, files):
        if way := cycle(edges):
            steps = " | ".join(lines[step] for step in itertools.pairwise(way))
            found.append(f"a cycle: {steps}")
    return list(dict.fromkeys(found))


def native_violations(src: Path) -> list[str]:
    return violations(src, NATIVE, includes(src), ".cpp .hpp .h .cu .cuh")


def python_violations(package: Path) -> list[str]:
    found = violations(package, PYTHON, own_imports(package), ".py")
    for path, number, line, name in imports(package):
        outside = name.partition(".")[0]
        if ONLY_IN.get(outside, room(path, package)) != room(path, package):
            found.append(f"{path}:{number}: {line}: only {ONLY_IN[outside]} imports {outside}")
    return found


def c_api_violations(native: Path) -> list[str]:
    """Functions of rotary.h that are defined elsewhere than in capi/, twice, or not at all."""
    header = (native / "include" / "rotary.h").read_text()
    names = re.findall(r"^\w[\w *]*?\b(rotary_\w+)\(", header, re.MULTILINE)
    where: dict[str, list[str]] = {name: [] for name in names}
    for path in sorted((native / "src").rglob("*.[ch]*")):
        text = path.read_text()
        for match in re.finditer(
            r"^\w[\w:<> *&]*?\b(rotary_\w+)\(([^;{}]*)\)\s*(noexcept\s*)?(try\s*)?{", text, re.MULTILINE
        ):
            if match[1] in where:
                number = text.count("\n", 0, match.start()) + 1
                where[match[1]].append(f"{path}:{number}: {text.splitlines()[number - 1]}")
                if room(path, native / "src") != "capi":
                    where[match[1]][-1] += ": only capi defines the C API"
    return [
        " | ".join(lines) or f"{name}: declared in rotary.h and not defined"
        for name, lines in where.items()
        if len(lines) != 1 or "only capi" in lines[0]
    ]


def test_the_library():
    found = native_violations(ROOT / "native" / "src")
    assert not found, "\n".join(found)


def test_the_package():
    found = python_violations(ROOT / "rotary_llamacpp")
    assert not found, "\n".join(found)


def test_only_capi_defines_the_c_api():
    found = c_api_violations(ROOT / "native")
    assert not found, "\n".join(found)


# ---- violations are noticed


@pytest.fixture
def tree(tmp_path):
    """A tree without violations, with a file in every room; its folder, and a function that writes files."""

    def write(name, text=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    for name in itertools.chain(*NATIVE):
        write(f"native/src/{name}/{name}.hpp", "#pragma once\n")
        write(f"native/src/{name}/{name}.cpp", f'#include "{name}/{name}.hpp"\n#include "base/base.hpp"\n')
    write("native/src/capi/capi.cpp", "int32_t rotary_a(int32_t a,\n                 int32_t b) try {\n")
    write("native/include/rotary.h", "int32_t rotary_a(int32_t a, int32_t b);\n")
    for name in itertools.chain(*PYTHON):
        write(
            f"rotary_llamacpp/{name}.py" if name.startswith("__") else f"rotary_llamacpp/{name}/__init__.py"
        )
    write("rotary_llamacpp/cli/__init__.py", "import click\nfrom ..runtime import llama\n")
    write("rotary_llamacpp/runtime/llama.py", "def f():\n    from ..native.binding import load\n")
    write("rotary_llamacpp/native/binding.py", "import cffi\nfrom . import stock\n")
    write("rotary_llamacpp/native/stock.py")
    assert native_violations(tmp_path / "native/src") == python_violations(tmp_path / "rotary_llamacpp") == []
    assert c_api_violations(tmp_path / "native") == []
    return tmp_path, write


WRONG_NATIVE = {
    "upwards": ("store/a.cpp", '#include "exec/exec.hpp"', ":1: .*: store may not depend on exec"),
    "beside": ("base/a.hpp", '\n#include "../store/store.hpp"', ":2: .*: base may not depend on store"),
    "a cycle of rooms": ("cache/a.cpp", '#include "stats/stats.hpp"', "a cycle: .*cache/a.cpp:1.*stats/a"),
    "a cycle of files": ("store/store.hpp", '#include "store/b.hpp"', "a cycle: .*b.hpp:1.*store.hpp:1"),
    "no room": ("pool.cpp", "", "pool.cpp: in no room"),
    "another room": ("utils/a.cpp", "", "utils/a.cpp: in no room"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_NATIVE)
def test_a_wrong_include_is_named(tree, what):
    folder, write = tree
    name, text, says = WRONG_NATIVE[what]
    write("native/src/stats/a.cpp", '#include "cache/cache.hpp"\n')
    write("native/src/store/b.hpp", '#include "store/store.hpp"\n')
    write(f"native/src/{name}", text)
    (line,) = native_violations(folder / "native/src")
    assert re.search(says, line), line


WRONG_PYTHON = {
    "upwards": ("native/a.py", "def f():\n    from ..runtime.llama import x", "a.py:2: .*: native may not"),
    "by its full name": ("errors/a.py", "import rotary_llamacpp.native.stock", "a.py:1: .*: errors may not"),
    "of the package": ("host/a.py", "from .. import native", "host may not depend on native"),
    "a cycle": ("native/stock.py", "from .binding import x", "a cycle: .*binding.py:2.*stock.py:1"),
    "cffi": ("host/a.py", "import cffi", "a.py:1: import cffi: only native imports cffi"),
    "click": ("runtime/a.py", "from click.testing import CliRunner", "only cli imports click"),
    "no room": ("bars.py", "", "bars.py: in no room"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_PYTHON)
def test_a_wrong_import_is_named(tree, what):
    folder, write = tree
    name, text, says = WRONG_PYTHON[what]
    write(f"rotary_llamacpp/{name}", text)
    (line,) = python_violations(folder / "rotary_llamacpp")
    assert re.search(says, line), line


def test_another_definition_of_the_c_api_is_named(tree):
    folder, write = tree
    write("native/src/exec/a.cpp", "// of others\nint32_t rotary_a(int32_t a, int32_t b) {\n")
    (line,) = c_api_violations(folder / "native")
    assert "exec/a.cpp:2: int32_t rotary_a" in line and "only capi defines the C API" in line
    write("native/include/rotary.h", "int32_t rotary_b(void);\n")
    assert c_api_violations(folder / "native") == ["rotary_b: declared in rotary.h and not defined"]
