# SPDX-License-Identifier: MIT
"""Models and runs that several tests share. Synthetic models are made once per session and arguments."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from models.synth import SHAPES, add_metadata, synthesize
from rotary_llamacpp import _native, pinned, traces
from tests.support import HANG_S, ROOT

# Of what the user has set, these are for tests.
FOR_TESTS = ("ROTARY_TESTS_ALLOW_NO_NATIVE", "ROTARY_LLAMA_CPP_DIR", "ROTARY_LIBRARY")


def pytest_configure() -> None:
    """The user's settings of ours, of llama.cpp's and of terminals are not what is tested."""
    for name in list(os.environ):
        ours = name.startswith(("ROTARY_", "GGML_", "LLAMA_", "OMP_")) and name not in FOR_TESTS
        if ours or name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            del os.environ[name]
    # Else threads spin for each other, for minutes on a busy machine.
    os.environ["OMP_WAIT_POLICY"] = "passive"

    from hypothesis import HealthCheck, settings  # not for the processes that tests start

    # No example is late, on however slow a machine.
    settings.register_profile("any machine", deadline=None, suppress_health_check=list(HealthCheck))
    settings.load_profile("any machine")


@pytest.fixture(scope="session")
def native() -> _native.Library:
    """The native library. Its absence is a failure, unless the environment says that it is meant."""
    if not _native.library_path().is_file() and os.environ.get("ROTARY_TESTS_ALLOW_NO_NATIVE") == "1":
        pytest.skip("native library not built, and ROTARY_TESTS_ALLOW_NO_NATIVE=1 allows that")
    return _native.load()


# A shell lets what it runs in the background ignore this, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The committed model: qwen3moe, 6 layers, 32 experts of which 4 are used."""
    return ROOT / "models" / "tiny-moe-q8_0.gguf"


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a synthetic model: 4 layers, 16 experts of which 4 are used, unless told otherwise."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(shape: str = "test", **kwargs: Any) -> Path:
        key = json.dumps([shape, kwargs], sort_keys=True)
        if key not in made:
            made[key] = synthesize(folder / f"{shape}-{len(made)}.gguf", shape, **kwargs)
        return made[key]

    return make


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer without experts."""
    shape = replace(SHAPES["test-llama"], experts=0, used=0, layers=1, embd=64, heads=1, heads_kv=1, ff=64)
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    writer = GGUFWriter(path, "llama")
    add_metadata(writer, shape, "dense")
    rng = np.random.default_rng(0)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", rng.normal(size=(64, 64)).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.normal(size=(shape.vocab, 64)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def lora_adapter(tmp_path: Path) -> Callable[[Path, tuple[str, ...]], Path]:
    """Makes a random LoRA adapter for the tensors of a model whose names contain one of some."""
    from tests.support import paged  # which loads llama.cpp: not before pytest_configure()

    return functools.partial(paged.write_adapter, tmp_path / "adapter.gguf")


@pytest.fixture(scope="session")
def stock_trace() -> Callable[..., dict[str, np.ndarray]]:
    """Runs tracing.py with stock llama_cpp, once for each model and options."""
    from tests.support import paged

    made: dict[str, dict[str, np.ndarray]] = {}

    def trace(model: Path, **options: Any) -> dict[str, np.ndarray]:
        key = json.dumps([str(model), options], sort_keys=True)
        if key not in made:
            made[key] = paged.stock_trace(model, **options)
        return made[key]

    return trace


@pytest.fixture
def rotary_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""

    def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-m", "rotary_llamacpp", *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)

    return run


@pytest.fixture(scope="session")
def late(native: _native.Library, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """late_device.cpp, compiled against the installed llama.cpp: the environment of a process that has it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler for late_device.cpp")
    sdist = ROOT / "build" / "sdist" / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    ggml = Path(os.environ.get("ROTARY_LLAMA_CPP_DIR", sdist)) / "ggml"
    if not ggml.is_dir():
        pytest.skip(f"{ggml}: no source of the pinned llama.cpp; run: make setup")
    folder = tmp_path_factory.mktemp("late")
    library = folder / "libggml-late.so"
    # As our own library finds ggml: among what is loaded, by SONAMEs, for which empty libraries stand here.
    major = pinned.GGML_VERSION.partition(".")[0]
    for name in ("ggml", "ggml-base"):
        soname = f"-Wl,-soname,lib{name}.so.{major}"
        subprocess.run(
            [compiler, "-shared", "-x", "c++", "/dev/null", soname, "-o", folder / f"lib{name}.so"],
            check=True,
        )
    flags = ["-std=c++17", "-O2", "-g", "-Wall", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"]
    defines = ["-DGGML_SHARED", "-DGGML_BACKEND_SHARED"]
    includes = [f"-I{ROOT / 'native' / 'src'}", f"-isystem{ggml / 'include'}", f"-isystem{ggml / 'src'}"]
    source = ROOT / "tests" / "support" / "late_device.cpp"
    link = ["-Wl,--no-as-needed", f"-L{folder}", "-lggml", "-lggml-base"]
    subprocess.run([compiler, *flags, *defines, *includes, source, "-o", library, *link], check=True)
    return {"ROTARY_LINK": str(library), "LATE_US": "200"}


@pytest.fixture
def shared_trace() -> Callable[[str], traces.Trace]:
    """Loads the recorded routing of a real model, where the checkout has it beside it."""

    def load(name: str) -> traces.Trace:
        path = ROOT.parent / "shared" / "traces" / f"{name}.route.csv"
        if not path.is_file():
            pytest.skip(f"{path}: not here")
        return traces.load(path)

    return load
