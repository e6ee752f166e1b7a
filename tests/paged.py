# SPDX-License-Identifier: MIT
"""Paged runs that tests compare with stock's, in this process or in one of their own.

A process of its own is for what could kill it (signals, memory limits, files that vanish) and for what must
be there before the library is loaded (LD_PRELOAD). What runs in it is a function of a test module.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HANG_S, ROOT
from gguf import GGUFWriter
from tracing import OPTIONS, trace

from rotary_llamacpp import Llama
from rotary_llamacpp.gguf_header import read_header

IN_A_PROCESS = """
import importlib, pickle, sys
sys.path[:0] = sys.argv[1:3]
with open(sys.argv[3], "rb") as file:
    module, function, args = pickle.load(file)
result = getattr(importlib.import_module(module), function)(*args)
with open(sys.argv[4], "wb") as file:
    pickle.dump(result, file)
"""


def make(model: Path, rotary: Any, **options: Any) -> Llama:
    """A model with the options that stock has in tracing.py."""
    return Llama(str(model), rotary=rotary, **{**OPTIONS, **options})


def paged_trace(
    model: Path, n_prompt: int, rotary: Any, n_decode: int = 12, **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Logits and greedy tokens of a paged run, and its figures."""
    llama = make(model, rotary, **options)
    try:
        return trace(llama, n_prompt, n_decode), llama.rotary_stats()
    finally:
        llama.close()


def assert_equal(paged: Mapping[str, np.ndarray], stock: Mapping[str, np.ndarray]) -> None:
    """Every bit of every logit, and that the logits are not trivial."""
    assert paged["greedy"].tolist() == stock["greedy"].tolist()
    assert paged["logits"].shape == stock["logits"].shape
    assert np.isfinite(stock["logits"]).all() and stock["logits"].std() > 0.1, "the reference says something"
    different = (paged["logits"] != stock["logits"]).any(axis=1)
    worst = np.abs(paged["logits"] - stock["logits"]).max()
    assert not different.any(), f"positions {np.flatnonzero(different)} differ, by up to {worst}"


class Apart:
    """A function of a test module in a process of its own, which does not outlive the ``with`` block.

    `result()` is what the function returns.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rotary-test-"))
        with open(self.folder / "call", "wb") as file:
            pickle.dump((function.__module__, function.__name__, args), file)
        command = [sys.executable, "-c", IN_A_PROCESS, ROOT, ROOT / "tests"]
        self.process = subprocess.Popen(
            [*prefix, *map(str, command), str(self.folder / "call"), str(self.folder / "result")],
            env={**os.environ, "OMP_WAIT_POLICY": "passive", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.folder)

    def result(self, timeout: float = HANG_S) -> Any:
        """Wait for it; it must end by itself, and well."""
        _, said = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, f"ended with {self.process.returncode}: {said[-2000:]}"
        with open(self.folder / "result", "rb") as file:
            return pickle.load(file)

    def wait_for(self, path: Path, timeout: float = HANG_S) -> None:
        """Wait until the process has made this file."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[1][-2000:]
            assert time.monotonic() < end, f"no {path.name} within {timeout} s"
            time.sleep(0.005)


def notices(stats: Mapping[str, Any]) -> list[str]:
    """Those of a run, but for what this machine forces on any: it has no io_uring, as in many containers, or
    the model's file system no direct reads."""

    def is_forced(text: str) -> bool:
        if "io_uring" in text:
            return not has_io_uring()
        return "refuses direct reads" in text and not reads_directly(text.partition(": ")[0])

    return [text for text in stats["notices"] if not is_forced(text)]


def reads_directly(path: Path | str) -> bool:
    """Whether its file system has O_DIRECT."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def has_io_uring() -> bool:
    """Whether the kernel gives a ring that knows IORING_OP_READ, as from 5.6 on."""
    parameters = (ctypes.c_uint32 * 30)()
    fd = ctypes.CDLL(None).syscall(425, 1, parameters)
    if fd < 0:
        return False
    os.close(fd)
    return bool(parameters[5] & 1 << 3)  # IORING_FEAT_RW_CUR_POS, which came with it


# Where address space is limited: glibc reserves 64 MiB of it for the first allocation of each thread.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def apart(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The same, waited for."""
    with Apart(function, *args, **options) as process:
        return process.result()


def preload(folder: Path, source: Path) -> dict[str, str]:
    """The environment of a process in which a C file's functions, compiled into `folder`, come first."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip(f"no C compiler for {source.name}")
    library = (folder / source.name).with_suffix(".so")
    if any(character in str(library) for character in " :"):
        pytest.skip(f"{library}: LD_PRELOAD takes no such name")
    if not library.exists():
        command = [compiler, "-shared", "-fPIC", "-O2", "-fexceptions", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True)
    before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's runtime, which must be first
    return {"LD_PRELOAD": f"{before} {library}".strip()}


def faulty_disk(folder: Path) -> dict[str, str]:
    """The environment of a process whose disk obeys `Disk`: faulty_disk.c, compiled into `folder`."""
    return preload(folder, ROOT / "tests" / "faulty_disk.c")


def exhaustion(folder: Path, function: str) -> dict[str, str]:
    """The environment of a process in which `function` obeys `Shortage`: exhaustion.c, built in `folder`."""
    return {**preload(folder, ROOT / "tests" / "exhaustion.c"), "EXHAUST": function}


class Knobs:
    """Variables of a preloaded library in this process, by their names there after `prefix`."""

    prefix: str

    def __init__(self) -> None:
        object.__setattr__(self, "library", ctypes.CDLL(None))

    def __getattr__(self, name: str) -> int:
        return ctypes.c_long.in_dll(self.library, f"{self.prefix}_{name}").value

    def __setattr__(self, name: str, value: int) -> None:
        ctypes.c_long.in_dll(self.library, f"{self.prefix}_{name}").value = value

    def set(self, **knobs: int) -> None:
        """Turn several."""
        for name, value in knobs.items():
            setattr(self, name, value)


class Shortage(Knobs):
    """The knobs of exhaustion.c: ``shortage.at = 3``."""

    prefix = "exhaust"

    def begin(self, **knobs: int) -> None:
        """Count anew, with these knobs."""
        usual = {"at": 0, "n": 1, "site": 0, "ring": 0, "calls": 0, "failed": 0, "on": 1}
        self.set(**{**usual, **knobs})

    def end(self) -> int:
        """No more failures; how many there were."""
        self.set(ring=0, on=0)
        return self.failed

    def place(self, site: int) -> int:
        """Offset in the library of the code that asked."""
        return (ctypes.c_long * 4097).in_dll(self.library, "exhaust_offset")[site]


class Disk(Knobs):
    """The knobs of faulty_disk.c: ``disk.delay_us = 500``."""

    prefix = "disk"

    def fail_next(self, n: int, after: int = 0) -> None:
        """Let `n` reads fail, beginning when `after` more have been made."""
        self.set(fail_at=self.reads + after + 1, n_fail=n)

    def hold_next(self, after: int = 0) -> None:
        """Let reads wait for `mend`, beginning when `after` more have been made."""
        self.set(held=0, hold_at=self.reads + after + 1)

    def wait_until_held(self) -> None:
        """Until a read waits; it must be of another thread."""
        while self.held == 0:
            time.sleep(0.001)

    def mend(self) -> None:
        """No more failures, and full speed."""
        self.set(fail_at=0, delay_us=0, hold_at=0, withheld=0, most=0)


def write_adapter(path: Path, model: Path, names: tuple[str, ...], seed: int = 0) -> Path:
    """A random LoRA adapter of rank 4 for the qwen3moe tensors whose names contain one of `names`."""
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rng = np.random.default_rng(seed)
    for tensor in read_header(model).tensors:
        if any(name in tensor.name for name in names):
            n_in, n_out, *experts = tensor.shape
            for half, shape in (("a", (*experts, 4, n_in)), ("b", (*experts, n_out, 4))):
                values = rng.normal(scale=0.05, size=shape).astype(np.float32)
                writer.add_tensor(f"{tensor.name}.lora_{half}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pure_logic(folder: Path, host: str, *sources: str) -> ctypes.CDLL:
    """A library of tests/`host` and of `sources` in native/src, which need nothing of ggml."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip(f"no C++ compiler for {host}")
    native = ROOT / "native" / "src"
    library = folder / "host.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-pthread",
        f"-I{native}",
    ]
    files = [ROOT / "tests" / host, *(native / each for each in sources)]
    flags += os.environ.get("ROTARY_TESTS_CXXFLAGS", "").split()  # tests/sanitize
    subprocess.run([compiler, *flags, *files, "-o", library], check=True)
    return ctypes.CDLL(str(library))
