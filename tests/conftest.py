# SPDX-License-Identifier: MIT
"""Models and runs that several tests share. A synthetic model is made once per session and arguments."""

from __future__ import annotations

import functools
import json
import os
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
from rotary_llamacpp import traces
from rotary_llamacpp.native import binding as _native
from tests import skips
from tests.support import HANG_S, ROOT, compiled, write_all

# The only variables of these prefixes that tests take from the user's environment.
FOR_TESTS = ("ROTARY_LLAMA_CPP_DIR", "ROTARY_LIBRARY", "ROTARY_TESTS_CXXFLAGS", "OMP_THREAD_LIMIT")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--named-skips", action="store_true", help="skips that skips.py does not name fail")


def name_skip(report: Any, config: pytest.Config) -> Any:
    """Turn the report of an unexpected skip, of a test or of a module, into a failure."""
    if config.getoption("--named-skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not skips.is_expected(report.nodeid, reason):
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}: skipped, {reason}; no skip that tests/skips.py expects"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    return name_skip((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    return name_skip((yield), collector.config)


def pytest_configure() -> None:
    """Remove the user's settings of Rotary, llama.cpp and terminals from the environment."""
    for name in list(os.environ):
        ours = name.startswith(("ROTARY_", "GGML_", "LLAMA_", "OMP_")) and name not in FOR_TESTS
        if ours or name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            del os.environ[name]
    # Else waiting threads spin, for minutes on a busy machine.
    os.environ["OMP_WAIT_POLICY"] = "passive"

    from hypothesis import HealthCheck, settings  # not for the processes that tests start

    # No deadline, as machines may be slow.
    settings.register_profile("any machine", deadline=None, suppress_health_check=list(HealthCheck))
    settings.load_profile("any machine")


@pytest.fixture(scope="session")
def native() -> _native.Library:
    """The native library."""
    return _native.load()


# Shells start background processes with SIGINT ignored, which processes that tests interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The committed model: qwen3moe, 6 layers, 32 experts of which 4 are used."""
    return ROOT / "models" / "tiny-moe-q8_0.gguf"


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a synthetic model; by default it has 4 layers and 16 experts, of which 4 are used."""
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
    """A model of architecture llama with one layer and no experts."""
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
    write_all(writer)
    return path


@pytest.fixture
def lora_adapter(tmp_path: Path) -> Callable[[Path, tuple[str, ...]], Path]:
    """Make a random LoRA adapter for those tensors of a model whose names contain one of the given ones."""
    from tests.support import paged  # loads llama.cpp, which must come after pytest_configure()

    return functools.partial(paged.write_adapter, tmp_path / "adapter.gguf")


@pytest.fixture(scope="session")
def stock_trace() -> Callable[..., dict[str, np.ndarray]]:
    """Run tracing.py with stock llama_cpp, once for each model and set of options."""
    from tests.support import paged

    made: dict[str, dict[str, np.ndarray]] = {}

    def trace(model: Path, **options: Any) -> dict[str, np.ndarray]:
        options = {"n_decode": 12, "use_extra_bufts": True, **options}
        key = json.dumps([str(model), options], sort_keys=True)
        if key not in made:
            made[key] = paged.stock_trace(model, **options)
        return made[key]

    return trace


@pytest.fixture
def exact(native: _native.Library, stock_trace: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Run a model paged, check that its logits are those of stock to the bit, and return the statistics."""
    from tests.support import paged

    def run(model: Path, n_prompt: int, rotary: Any, n_decode: int = 12, **options: Any) -> dict[str, Any]:
        found, stats = paged.paged_trace(model, n_prompt, rotary, n_decode, **options)
        options["use_extra_bufts"] = not isinstance(rotary, dict) or rotary.get("repack", True)
        options.pop("n_gpu_layers", None)
        paged.assert_equal(found, stock_trace(model, n_prompt=n_prompt, n_decode=n_decode, **options))
        return stats

    return run


@pytest.fixture
def rotary_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-m", "rotary_llamacpp", *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)

    return run


@pytest.fixture(scope="session")
def late(native: _native.Library, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that can load late_device.cpp, with paged.load_late()."""
    return {"ROTARY_LINK": str(compiled.late_device(tmp_path_factory.mktemp("late"))), "LATE_US": "200"}


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Environments of processes whose disk obeys compiled.Disk, by way of reading: "threads", "io_uring"."""
    environment = compiled.preload(tmp_path_factory.mktemp("disk"), compiled.HERE / "faulty_disk.c")
    return {io: {**environment, "ROTARY_IO": io} for io in ("threads", "io_uring")}


@pytest.fixture(scope="session")
def short_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Make the environment of a process in which a given system function obeys compiled.Shortage."""
    environment = compiled.preload(tmp_path_factory.mktemp("shortage"), compiled.HERE / "exhaustion.c")
    return lambda function, io="threads": {**environment, "EXHAUST": function, "ROTARY_IO": io}


@pytest.fixture
def shared_trace() -> Callable[[str], traces.Trace]:
    """Load the recorded routing of a real model from a folder beside the checkout, if it is there."""

    def load(name: str) -> traces.Trace:
        path = ROOT.parent / "shared" / "traces" / f"{name}.route.csv"
        if not path.is_file():
            pytest.skip(f"{path}: not here")
        return traces.load(path)

    return load
