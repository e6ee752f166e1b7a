# SPDX-License-Identifier: MIT
"""llama-cpp-python's own tests, unchanged, with our Llama in the place of stock's and experts paged.

The models that they download are replaced by local ones of the same kind: a transformer with experts, one
with pooling, a mamba, a jamba with experts. Tests that expect the words of a certain model are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from rotary_llamacpp import pinned
from tests.support import HANG_S, ROOT, recurrent, write_all

pytestmark = [pytest.mark.conformance, pytest.mark.model, pytest.mark.slow]

SDIST = ROOT / "build" / "sdist" / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}"
# These expect tokens or words of Qwen3.5-0.8B; tests/model/test_api.py compares what they use with stock.
QWEN = "asks the Hub for Qwen3.5-0.8B-Q8_0.gguf"
SKIPPED = {
    "test_llama.py::test_real_model": QWEN,
    "test_llama.py::test_real_llama": QWEN,
    "test_llama.py::test_real_llama_repeated_prompt_cache": QWEN,
}
N_TESTS = 26


def with_pooling(path, model):
    """Write a copy of a model that says that its embeddings are means."""
    reader = GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_uint32(f"{arch}.pooling_type", 1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    write_all(writer)
    return path


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Local files by the names that the tests ask the Hub for."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tinyllamas/stories15M-q4_0.gguf": tiny_model,
        "bge-small-en-v1.5-q4_k_m.gguf": with_pooling(folder / "pooling.gguf", tiny_model),
        "mamba-130m-hf.Q2_K.gguf": recurrent.write(folder / "mamba.gguf", hybrid=False),
        "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf": recurrent.write(folder / "jamba.gguf", hybrid=True),
    }


@pytest.fixture
def upstream(models, tmp_path):
    """Runs their tests with a `rotary` argument, or "stock"; outcomes by test, and figures of the models."""

    def run(rotary):
        assert (SDIST / "tests").is_dir(), f"{SDIST}: not there; run: make conformance"
        out = tmp_path / "out.json"
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "DROP_IN": rotary,
            "DROP_IN_MODELS": json.dumps({name: str(path) for name, path in models.items()}),
            "DROP_IN_OUT": str(out),
        }  # fmt: skip
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.support.drop_in", "-p", "no:cacheprovider"),
            *("--rootdir", SDIST, "-c", os.devnull, "tests"),
        ]
        ran = subprocess.run(
            command, cwd=SDIST, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
        )
        assert out.is_file(), ran.stdout[-4000:] + ran.stderr[-4000:]
        print(ran.stdout.strip().splitlines()[-1])
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize("rotary", ["stock", "25%", "min"])
def test_upstreams_tests(native, upstream, rotary):
    ran = upstream(rotary)
    outcomes = ran["outcomes"]
    others = {name: outcome for name, outcome in outcomes.items() if outcome != "passed"}
    assert others == SKIPPED, "\n".join(f"{name}: {outcome}" for name, outcome in others.items())
    assert len(outcomes) == N_TESTS
    if rotary != "stock":
        reasons = [stats["reason"] for stats in ran["stats"] if not stats["active"]]
        assert set(reasons) == {"dense model, paging does not apply", "vocab_only loads no weights"}
        paged = [stats for stats in ran["stats"] if stats["active"]]
        assert len(paged) >= 15 and all(stats["misses"] > 0 for stats in paged)
        assert {stats["n_expert"] for stats in paged} == {32, 16}, "the transformer and the hybrid"
