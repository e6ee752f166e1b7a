# SPDX-License-Identifier: MIT
"""The pages of reference against the code: all that there is stands in them, and nothing that is not."""

from __future__ import annotations

import ast
import keyword
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields

import click

from rotary_llamacpp.cli import main
from rotary_llamacpp.config import RotaryConfig
from rotary_llamacpp.native import binding
from rotary_llamacpp.runtime.paging import Paging
from tests.docs import console, pages
from tests.docs.pages import Page
from tests.support import ROOT

COMMAND_LINE = Page("docs/command-line.md")
# Options of llama.cpp's programs that pages may mention alone.
OF_LLAMA_CPP = {
    "--cpu-moe", "--device", "--fit", "--mlock", "--n-cpu-moe", "--no-mmap", "--no-op-offload", "--no-repack",
    "--override-tensor", "--split-mode",
}  # fmt: skip
# Quoted in code, and no variables of the environment.
OTHER_NAMES = {"ROTARY_PAGED"}


HELP = {"-h", "--help"}


def options(command: click.Command) -> set[str]:
    """Names of a command's options, such as -n and --n-predict, without those of help."""
    return {name for param in command.params if isinstance(param, click.Option) for name in param.opts} - HELP


def every_option() -> set[str]:
    return (options(main) | HELP).union(*(options(command) for command in main.commands.values()))


def options_of_scripts() -> set[str]:
    """Options of benchmarks and of the generator of models."""
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "models").glob("*.py")]
    return {name for path in files for name in re.findall(r"\"(--[a-z][\w-]*)\"", path.read_text())}


def words(text: str) -> set[str]:
    """Options in a text: -n, --n-predict."""
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


# ---- command line


def test_every_command_and_option_is_in_its_page():
    text = " ".join(COMMAND_LINE.code) + "".join(fence.text for fence in COMMAND_LINE.fences)
    for name, command in main.commands.items():
        assert f"rotary {name}" in text, f"{COMMAND_LINE.name}: no `rotary {name}`"
        missing = options(command) - words(text)
        assert not missing, f"{COMMAND_LINE.name}: rotary {name} has {missing}"
    assert options(main) | HELP <= words(text)


def test_the_page_of_the_command_line_has_no_other_option():
    others = {each for code in COMMAND_LINE.code if code.startswith("-") for each in words(code)}
    assert others <= every_option() | OF_LLAMA_CPP


def calls_of_rotary(page: Page) -> Iterator[list[str]]:
    """The words of each command of ours, in fences and in the text, each up to a pipe or the like."""
    lines = [line for block in page.fences if block.language in ("console", "shell")
             for line in console.commands(block)]  # fmt: skip
    for line in (*lines, *page.code):
        for part in re.split(r"[|;&)]|\$\(", line):
            lexer = shlex.shlex(part, posix=True, punctuation_chars=False)
            lexer.whitespace_split, lexer.commenters = True, "#"
            try:
                found = list(lexer)
            except ValueError:  # a quotation that the split has cut
                found = part.split()
            while found and re.fullmatch(r"\w+=.*", found[0]):
                del found[0]
            if found[:1] == ["rotary"] and len(found) > 1:
                yield found[1:]


def test_every_command_and_option_that_pages_mention_exists():
    for page in pages.every():
        for name, *arguments in calls_of_rotary(page):
            if name.startswith("-"):
                known, arguments = options(main), [name]
            else:
                if not name.islower():  # NAME, or ...
                    continue
                assert name in main.commands, f"{page.name}: rotary {name}: no such command"
                known = options(main.commands[name])
            known |= HELP
            given = {word.partition("=")[0] for word in arguments if re.fullmatch(r"--?[a-z].*", word)}
            assert given <= known, f"{page.name}: rotary {name}: no {given - known}"
        alone = {word for code in page.code if code.startswith("--") for word in words(code.split()[0])}
        unknown = alone - every_option() - options_of_scripts() - OF_LLAMA_CPP
        assert not unknown, f"{page.name}: no command has {unknown}"


def exit_codes() -> set[int]:
    """What is given to sys.exit() and os._exit() as a number, and 0."""
    found = {0}
    for path in (ROOT / "rotary_llamacpp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "os._exit"):
                # Constants that are the argument, or one of two in a condition; no text.
                given = [part for each in node.args for part in (each, *ast.iter_child_nodes(each))]
                constants = [part.value for part in given if isinstance(part, ast.Constant)]
                found |= {value for value in constants if type(value) is int}
    return found


def test_exit_codes():
    shown = filter(str.isdigit, pages.first_cells(COMMAND_LINE.section("exit status")))
    assert sorted(map(int, shown)) == sorted(exit_codes())


# ---- environment


def variables_in_code() -> set[str]:
    """Names of variables of ours that the library, the package and its build have in quotation marks."""
    files = [ROOT / "setup.py", *(ROOT / "rotary_llamacpp").rglob("*.py")]
    files += [path for path in (ROOT / "native" / "src").rglob("*") if path.is_file()]
    quoted = {name for path in files for name in re.findall(r"\"(ROTARY_[A-Z_]+)\"", path.read_text())}
    return quoted - OTHER_NAMES - constants()


def constants() -> set[str]:
    """Names that rotary.h declares."""
    return set(re.findall(r"\bROTARY_[A-Z_]+\b", re.sub(r"//.*", "", binding.api_declarations())))


def test_every_variable_of_the_environment_is_in_its_page_and_no_other():
    listed = pages.first_cells("\n".join(Page("docs/environment.md").prose))
    ours = [name for name in listed if name.startswith("ROTARY_")]
    assert sorted(ours) == sorted(variables_in_code())


def test_pages_name_no_other_variable():
    known = variables_in_code() | OTHER_NAMES | constants()
    for page in pages.every():
        named = set(re.findall(r"\bROTARY_[A-Z_]+\b", page.path.read_text()))
        assert named <= known, f"{page.name}: {named - known}"


# ---- Python


def test_every_counter_is_in_its_page_and_no_other(native):
    page = Page("docs/counters.md")
    per_layer = page.section("per layer")
    of_layers = {name for name, _ in native.ffi.typeof("rotary_layer_stats").fields} | {"hit_rate"}
    assert sorted(pages.first_cells(per_layer)) == sorted(of_layers)
    whole = "\n".join(page.prose).replace(per_layer, "")
    assert sorted(pages.first_cells(whole)) == sorted(Paging(None).stats())


def test_every_field_of_the_configuration_is_in_its_page_and_no_other():
    listed = pages.first_cells(Page("docs/python-api.md").section("RotaryConfig"))
    listed = [name for name in listed if name.isidentifier() and not keyword.iskeyword(name)]  # no values
    assert sorted(listed) == sorted(field.name for field in fields(RotaryConfig))
