# SPDX-License-Identifier: MIT
"""C and C++ that tests compile: the library's pure logic alone, and preloaded libraries with their knobs.

Without a compiler such a test is skipped.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rotary_llamacpp import pinned
from tests.support import ROOT

HERE = Path(__file__).resolve().parent
NATIVE = ROOT / "native" / "src"


def compiled(library: Path, *arguments: Any, compiler: str = os.environ.get("CXX", "c++")) -> Path:
    """Compile a shared library from these sources and flags."""
    if not shutil.which(compiler):
        pytest.skip(f"no compiler {compiler} for {library.name}")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", *arguments, "-o", library], check=True)
    return library


def pure_logic(folder: Path, host: str, *sources: str) -> ctypes.CDLL:
    """Compile and load tests/`host` with `sources` of native/src, which must not need ggml."""
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}"]
    flags += os.environ.get("ROTARY_TESTS_CXXFLAGS", "").split()  # tests/sanitize
    files = [ROOT / "tests" / host, *(NATIVE / each for each in sources)]
    return ctypes.CDLL(str(compiled(folder / "host.so", *flags, *files)))


def late_device(folder: Path) -> Path:
    """Compile late_device.cpp against the pinned llama.cpp."""
    sdist = ROOT / "build" / "sdist" / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    ggml = Path(os.environ.get("ROTARY_LLAMA_CPP_DIR", sdist)) / "ggml"
    if not ggml.is_dir():
        pytest.skip(f"{ggml}: no source of the pinned llama.cpp; run: make setup")
    # Like the library itself, it finds the loaded ggml by SONAME; it is linked with empty libraries of these.
    major = pinned.GGML_VERSION.partition(".")[0]
    for name in ("ggml", "ggml-base"):
        compiled(folder / f"lib{name}.so", "-x", "c++", "/dev/null", f"-Wl,-soname,lib{name}.so.{major}")
    flags = ["-std=c++17", "-g", "-Wall", "-pthread", "-fvisibility=hidden"]
    defines = ["-DGGML_SHARED", "-DGGML_BACKEND_SHARED"]
    includes = [f"-I{NATIVE}", f"-isystem{ggml / 'include'}", f"-isystem{ggml / 'src'}"]
    link = ["-Wl,--no-as-needed", f"-L{folder}", "-lggml", "-lggml-base"]
    library = folder / "libggml-late.so"
    return compiled(library, *flags, *defines, *includes, HERE / "late_device.cpp", *link)


def preload(folder: Path, source: Path) -> dict[str, str]:
    """Compile a C file in `folder`; returns the environment of a process that preloads it."""
    library = (folder / source.name).with_suffix(".so")
    if any(character in str(library) for character in " :"):
        pytest.skip(f"{library}: LD_PRELOAD takes no such name")
    if not library.exists():
        compiled(library, "-fexceptions", source, "-ldl", compiler=os.environ.get("CC", "cc"))
    before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's runtime, which must be first
    return {"LD_PRELOAD": f"{before} {library}".strip()}


class Knobs:
    """The variables of a library preloaded in this process, by their names without `prefix`."""

    prefix: str

    def __init__(self) -> None:
        object.__setattr__(self, "library", ctypes.CDLL(None))

    def __getattr__(self, name: str) -> int:
        return ctypes.c_long.in_dll(self.library, f"{self.prefix}_{name}").value

    def __setattr__(self, name: str, value: int) -> None:
        ctypes.c_long.in_dll(self.library, f"{self.prefix}_{name}").value = value

    def set(self, **knobs: int) -> None:
        """Set several knobs."""
        for name, value in knobs.items():
            setattr(self, name, value)


class Shortage(Knobs):
    """The knobs of exhaustion.c: ``shortage.at = 3``."""

    prefix = "exhaust"

    def begin(self, **knobs: int) -> None:
        """Reset the counters and set these knobs."""
        usual = {"at": 0, "n": 1, "site": 0, "ring": 0, "calls": 0, "failed": 0, "on": 1}
        self.set(**{**usual, **knobs})

    def end(self) -> int:
        """Stop failing calls; returns how many failed."""
        self.set(ring=0, on=0)
        return self.failed

    def place(self, site: int) -> int:
        """Offset in the library of the code that made the call numbered `site`."""
        return (ctypes.c_long * 4097).in_dll(self.library, "exhaust_offset")[site]


class Disk(Knobs):
    """The knobs of faulty_disk.c: ``disk.delay_us = 500``."""

    prefix = "disk"

    def fail_next(self, n: int, after: int = 0) -> None:
        """Let `n` reads fail after the next `after` reads."""
        self.set(fail_at=self.reads + after + 1, n_fail=n)

    def hold_next(self, after: int = 0) -> None:
        """Let reads wait until `mend()`, after the next `after` reads."""
        self.set(held=0, hold_at=self.reads + after + 1)

    def wait_until_held(self) -> None:
        """Wait until a read of another thread waits."""
        while self.held == 0:
            time.sleep(0.001)

    def mend(self) -> None:
        """End all failures and delays."""
        self.set(fail_at=0, delay_us=0, hold_at=0, withheld=0, max=0)
