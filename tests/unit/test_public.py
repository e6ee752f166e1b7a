# SPDX-License-Identifier: MIT
"""What the package exports, and what type checkers and editors see of it."""

from __future__ import annotations

import importlib.resources
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
import types
import typing
from pathlib import Path

import llama_cpp
import pytest

import rotary_llamacpp
from rotary_llamacpp import Llama, LlamaOptions, errors
from tests.support import HANG_S, ROOT


def test_every_public_name_is_there_and_explained():
    assert dir(rotary_llamacpp) == sorted(rotary_llamacpp.__all__)
    for name in set(rotary_llamacpp.__all__) - {"__version__"}:
        public = getattr(rotary_llamacpp, name)
        assert public.__name__ == name and inspect.getdoc(public), name
        assert not re.match(r"(Of|The same|Its)\b", inspect.getdoc(public)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rotary_llamacpp.nothing  # noqa: B018


def test_type_checkers_are_told_of_every_public_name():
    source = Path(rotary_llamacpp.__file__).read_text()
    told = source.partition("if TYPE_CHECKING:")[2].partition("\nlogging.")[0]
    for name in rotary_llamacpp.__all__:
        assert re.search(rf"\b{name}\b", told), name


def test_every_error_is_public():
    kinds = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert kinds <= set(rotary_llamacpp.__all__)
    assert all(getattr(rotary_llamacpp, name) is getattr(errors, name) for name in kinds)
    assert issubclass(rotary_llamacpp.BudgetError, rotary_llamacpp.RotaryError)
    assert issubclass(rotary_llamacpp.ModelError, rotary_llamacpp.RotaryError)


def spelt_alike(kind):
    """A type as nested tuples, in which List[int] is list[int] and Optional[int] is int | None."""
    origin, parts = typing.get_origin(kind), [spelt_alike(part) for part in typing.get_args(kind)]
    if origin in (typing.Union, types.UnionType):
        return frozenset(parts)
    return kind if origin is None else (origin, *parts)


def test_options_are_those_of_the_installed_llama_cpp():
    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters
    stock = typing.get_type_hints(llama_cpp.Llama.__init__)
    named = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]
    ours = typing.get_type_hints(LlamaOptions)
    assert list(ours) == named and not LlamaOptions.__required_keys__
    for name in named:
        assert spelt_alike(ours[name]) == spelt_alike(stock[name]), name


def test_from_pretrained_takes_stocks_arguments_and_one_more():
    stock, ours = (
        dict(inspect.signature(kind.from_pretrained).parameters) for kind in (llama_cpp.Llama, Llama)
    )
    assert ours.pop("rotary").default == "auto"
    assert [(name, each.default, each.kind) for name, each in ours.items()] == [
        (name, each.default, each.kind) for name, each in stock.items()
    ]


def test_the_package_says_that_it_is_typed():
    assert (importlib.resources.files(rotary_llamacpp) / "py.typed").is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["rotary_llamacpp"]


USER = """
from collections.abc import Mapping
from typing import Any, assert_type

import rotary_llamacpp
from rotary_llamacpp import BudgetError, LayerStats, Llama, ModelError, RotaryConfig, RotaryStats, activate

with Llama("m.gguf", rotary="25%", n_ctx=4096, n_gpu_layers=-1, flash_attn=True, verbose=False) as llama:
    assert_type(llama, Llama)
    stats = llama.rotary_stats()
assert_type(stats, RotaryStats)
assert_type(stats.hits, int)
assert_type(stats.hit_rate, float | None)
assert_type(stats.layers[0], LayerStats)
assert_type(stats.layers[0].n_resident, int)
assert_type(stats.to_dict(), dict[str, Any])
figures: Mapping[str, Any] = stats
for rotary in ("auto", 0.25, 8 << 30, None, False, {"budget": "min"}, RotaryConfig(store="direct")):
    Llama("m.gguf", rotary=rotary)
assert_type(Llama.from_pretrained("someone/model", "*.gguf", rotary="min", n_ctx=512), Llama)

class Mine(Llama):
    pass

assert_type(Mine.from_pretrained("someone/model", "*.gguf"), Mine)
with Mine("m.gguf") as mine:
    assert_type(mine, Mine)
activate("min")
with activate(RotaryConfig(budget="8GiB")):
    pass
try:
    llama.rotary_set_budget("8 slots")
except (BudgetError, ModelError) as error:
    print(error, rotary_llamacpp.__version__)
"""
WRONG = {
    'Llama("m.gguf", n_ctx="4096")': "arg-type",
    'Llama("m.gguf", n_ctxt=4096)': "call-arg",
    'Llama("m.gguf", rotary=[1])': "arg-type",
    'Llama.from_pretrained("a/b", "c", verbose="no")': "arg-type",
    'Llama("m.gguf").rotary_stats().hit_rat': "attr-defined",
    'Llama("m.gguf").rotary_stats().layers[0].notices': "attr-defined",
    'Llama("m.gguf").rotary_stats().hits + ""': "operator",
    "rotary_llamacpp.Lama": "attr-defined",
    "activate([])": "arg-type",
}


@pytest.mark.slow
def test_a_users_program_as_mypy_sees_it(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    good, wrong = tmp_path / "good.py", tmp_path / "wrong.py"
    good.write_text(USER)
    wrong.write_text(
        "\n".join(["import rotary_llamacpp", "from rotary_llamacpp import Llama, activate", *WRONG])
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-error-summary",
        "--config-file=",
        f"--cache-dir={tmp_path}",
    ]
    ran = subprocess.run(
        [*command, "--follow-imports=silent", "--ignore-missing-imports", good, wrong],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    assert ran.stderr == "" and "good.py" not in ran.stdout, ran.stdout + ran.stderr
    found = {
        int(line): code for line, code in re.findall(r"wrong\.py:(\d+): error: .*\[([\w-]+)\]", ran.stdout)
    }
    assert found == dict(enumerate(WRONG.values(), 3)), ran.stdout
