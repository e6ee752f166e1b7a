# SPDX-License-Identifier: MIT
"""Every feature of llama_cpp.Llama gives, paged, exactly what stock gives: tests/support/api_calls.py."""

from __future__ import annotations

import pickle
import subprocess
import sys

import llama_cpp
import pytest

from rotary_llamacpp import Llama, activate
from tests.support import HANG_S, ROOT, api_calls

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def stock(tiny_model, tmp_path_factory):
    """What stock gives, in a process that never sees this package, by name of the call."""
    folder = tmp_path_factory.mktemp("stock")
    script, out = ROOT / "tests" / "support" / "api_calls.py", folder / "out.pickle"
    command = [sys.executable, script, tiny_model, folder, out]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return pickle.loads(out.read_bytes())


class Paged(api_calls.Make):
    """Makes models, and counts those that are paged."""

    def run(self, name, folder):
        result = super().run(name, folder)
        stats = [llama.rotary_stats() for llama in self.made]
        assert stats and all(each.active and each.path == "slots" and each.misses > 0 for each in stats)
        return result


@pytest.mark.parametrize("rotary", ["25%", {"budget": "min", "store": "direct"}], ids=["25%", "min, direct"])
@pytest.mark.parametrize("name", api_calls.CALLS)
def test_as_stock(native, tiny_model, stock, tmp_path, name, rotary):
    found = Paged(Llama, tiny_model, rotary=rotary).run(name, tmp_path)
    assert found == stock[name]
    assert len(str(found)) > 50, "there is something to compare"


@pytest.mark.parametrize("name", api_calls.CALLS)
def test_as_stock_by_activation(native, tiny_model, stock, tmp_path, name):
    with activate("25%"):
        assert Paged(llama_cpp.Llama, tiny_model).run(name, tmp_path) == stock[name]


def test_the_comparison_sees_a_difference(tiny_model, stock, tmp_path):
    other = api_calls.Make(Llama, tiny_model, rotary="25%", rope_freq_base=500.0)
    assert other.run("completion", tmp_path) != stock["completion"]


def test_a_state_of_stock_goes_on_paged(native, tiny_model, tmp_path):
    answers = []
    source = api_calls.Make(llama_cpp.Llama, tiny_model)()
    source.eval(source.tokenize(api_calls.PROMPT.encode()))
    state = source.save_state()
    with Llama(str(tiny_model), rotary="min", **api_calls.OPTIONS) as paged:
        for llama in (source, paged):
            llama.load_state(state)
            answers.append(api_calls.text(llama(api_calls.PROMPT, **api_calls.SAMPLED)))
        assert paged.rotary_stats().misses > 0
    source.close()
    assert answers[0] == answers[1] != ""
