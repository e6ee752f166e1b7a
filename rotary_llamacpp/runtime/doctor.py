# SPDX-License-Identifier: MIT
"""Checks that paging can work on this machine, one verdict and one piece of advice at a time.

Changes nothing. llama.cpp is first imported in a child process, because a build for another CPU would kill
this one.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import pinned
from ..errors import RotaryError
from ..host import disk, machine
from ..native import binding
from ..native.stock_version import check_llama_cpp_version
from ..units import MIB, mib

OK, WARN, FAIL = "ok", "warn", "FAIL"

_SLOW_DISK = 500 * MIB  # bytes per second; below it, a cold expert costs tens of milliseconds


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `advice` is empty when there is nothing to do."""

    name: str
    verdict: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{self.verdict:<4}  {self.name:<17} {self.detail}{advice}"


def examine(model: str | None = None) -> Iterator[Check]:
    """Run the checks, most basic first; those that need the native library follow only if it loads.

    Parameters
    ----------
    model : str, optional
        A file to measure the disk with; by default a temporary one is written where that is a disk.
    """
    yield Check("python", OK, f"{platform.python_version()} on {platform.machine()}")
    importable = _import_llama_cpp()
    yield importable
    yield _guarded("llama-cpp-python", _llama_cpp_version)
    yield _guarded("native library", _library_file)
    if importable.verdict == OK:
        yield _guarded("abi", _abi)
        lib = binding.loaded()
        if lib is not None:
            for device in range(lib.device_count()):
                yield Check("device", OK, f"{lib.name(device)} over {lib.inner(device)}")
    yield _cuda_link()
    yield _processors()
    yield _memory()
    yield _memlock()
    yield _guarded("disk", lambda: _disk(model))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except RotaryError as error:
        detail, _, advice = str(error).rpartition("; ")
        return Check(name, FAIL, detail, advice)
    except OSError as error:
        return Check(name, WARN, f"could not be measured: {error}")


def _import_llama_cpp() -> Check:
    child = subprocess.run(
        [sys.executable, "-c", "import llama_cpp"], capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return Check("llama.cpp", OK, "imports")
    build = pinned.REBUILD_LLAMA_CPP
    if child.returncode < 0:
        return Check(
            "llama.cpp",
            FAIL,
            f"the import died of signal {-child.returncode}: built for another CPU",
            build,
        )
    said = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
    return Check("llama.cpp", FAIL, f"cannot be imported: {said[-1]}", build)


def _llama_cpp_version() -> Check:
    return Check("llama-cpp-python", OK, f"{check_llama_cpp_version()}, as pinned")


def _library_file() -> Check:
    path = binding.library_path()
    machine.check_library_machine(path)
    return Check("native library", OK, str(path))


def _abi() -> Check:
    lib = binding.load()
    version, commit = lib.built_ggml()
    return Check("abi", OK, f"{binding.ABI_VERSION}, compiled against the loaded ggml {version} ({commit})")


def _cuda_link() -> Check:
    path = binding.library_path().with_name("libggml-rotary-cuda.so")
    lib = binding.loaded()
    on_gpu = lib is not None and any(inner.startswith("CUDA") for inner in lib.default_inner)
    if path.is_file():
        return Check("cuda paging", OK, "on" if on_gpu else "built; ggml sees no CUDA device")
    detail = f"off: {path.name} was not built, nvcc was not found"
    if on_gpu:
        return Check("cuda paging", WARN, detail, "install the CUDA toolkit, then Rotary again")
    return Check("cuda paging", OK, detail)


def _processors() -> Check:
    """Count the processors, and those that this process may keep busy."""
    found, usable = os.cpu_count() or 1, machine.cpu_count()
    if usable == found:
        return Check("processors", OK, f"{found}")
    by = "a cgroup's quota" if usable < machine.allowed_cpus() else "affinity"
    return Check("processors", OK, f"{usable} of {found}, limited by {by}")


def _memory() -> Check:
    available = machine.available_memory()
    if available is None:
        return Check("memory", WARN, "the kernel does not say how much is free", "give a budget, not auto")
    detail = f"{mib(available, 0)} available"
    total, installed = machine.total_memory(), machine.installed_memory()
    if total is not None and installed is not None and total < installed:
        detail += f", limited by a cgroup to {mib(total, 0)}"
    if available < 1024 * MIB:
        return Check("memory", WARN, detail, "close other programs or give a small budget")
    return Check("memory", OK, detail)


def _memlock() -> Check:
    limit = machine.memlock_limit()
    if limit is None:
        return Check("page-lock limit", OK, "unlimited")
    detail = f"{mib(limit, 0)} (RLIMIT_MEMLOCK)"
    lib = binding.loaded()
    if lib is None or lib.default_inner == ["CPU"]:
        return Check("page-lock limit", OK, f"{detail}; the CPU inner device locks nothing")
    if limit < 256 * MIB:
        return Check(
            "page-lock limit", WARN, detail, "raise it with `ulimit -l unlimited`: staging is page-locked"
        )
    return Check("page-lock limit", OK, detail)


def _disk(model: str | None) -> Check:
    try:
        found, place = disk.measure(Path(model) if model else None)
    except RotaryError as error:
        detail, _, advice = str(error).rpartition("; ")
        return Check("disk", WARN, f"not measured: {detail}", advice)
    where = place if model else f"a temporary file in {place}"
    detail = f"{mib(found.rate, 0)}/s reading {mib(found.n_bytes, 0)} of {where} ({found.how})"
    if found.rate < _SLOW_DISK:
        return Check(
            "disk", WARN, detail, "keep the model on a faster disk, or give a budget that holds most experts"
        )
    return Check("disk", OK, detail)
