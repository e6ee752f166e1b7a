# SPDX-License-Identifier: MIT
"""Running functions of test modules in processes of their own, and features that the system offers.

Tests use a separate process for what could kill it (signals, memory limits, files that vanish) and for
settings that must precede the loading of the library (LD_PRELOAD).
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

from tests.support import HANG_S, ROOT

IN_A_PROCESS = """
import importlib, pickle, sys
sys.path.insert(0, sys.argv[1])
with open(sys.argv[2], "rb") as file:
    module, function, args = pickle.load(file)
result = getattr(importlib.import_module(module), function)(*args)
with open(sys.argv[3], "wb") as file:
    pickle.dump(result, file)
"""


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
        command = [sys.executable, "-c", IN_A_PROCESS, ROOT]
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
        """Wait for the process, which must exit with status 0, and return the function's result."""
        _, said = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, f"ended with {self.process.returncode}: {said[-2000:]}"
        with open(self.folder / "result", "rb") as file:
            return pickle.load(file)

    def wait_for(self, path: Path, timeout: float = HANG_S) -> None:
        """Wait until the process has created this file."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[1][-2000:]
            assert time.monotonic() < end, f"no {path.name} within {timeout} s"
            time.sleep(0.005)


def apart(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of a test module in a process of its own; returns its result."""
    with Apart(function, *args, **options) as process:
        return process.result()


def python(code: str, *args: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that can import the package and the tests; it must exit with status 0."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert ran.returncode == 0, f"ended with {ran.returncode}: {ran.stderr[-2000:]}"
    return ran


# For limited address space: by default glibc reserves 64 MiB for the first allocation of each thread.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def reads_directly(path: Path | str) -> bool:
    """Whether the file system of a file accepts O_DIRECT."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def has_io_uring() -> bool:
    """Whether the kernel allows io_uring, with IORING_OP_READ (Linux 5.6 or newer)."""
    parameters = (ctypes.c_uint32 * 30)()
    libc = ctypes.CDLL(None)
    fd = libc.syscall(425, 1, parameters)
    if fd < 0:
        return False
    enters = libc.syscall(426, fd, 0, 0, 0, None, 0) == 0
    os.close(fd)
    return enters and bool(parameters[5] & 1 << 3)  # IORING_FEAT_RW_CUR_POS, which came with Linux 5.6


def expected_io(io: str) -> str:
    """How direct reads are made on this machine if ROTARY_IO is `io`, "threads" or "io_uring"."""
    return "uring" if io == "io_uring" and has_io_uring() else "threads"
