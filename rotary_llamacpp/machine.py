# SPDX-License-Identifier: MIT
"""What this machine is: its CPU and memory, and which CPU a shared library was built for. Loads nothing."""

from __future__ import annotations

import os
import platform
import resource
import struct
from pathlib import Path

from .errors import LibraryError

# e_machine in an ELF header, by the name platform.machine() uses.
_ELF_MACHINES = {
    3: "i386",
    40: "armv7l",
    62: "x86_64",
    183: "aarch64",
    21: "ppc64le",
    22: "s390x",
    243: "riscv64",
}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64", "i686": "i386", "i586": "i386"}

# ggml_cpu_has_<key>() is a constant of the llama.cpp build; the value is the flag in /proc/cpuinfo it relies
# on.
CPU_FEATURES = {
    "sse3": "pni", "ssse3": "ssse3", "avx": "avx", "avx_vnni": "avx_vnni", "avx2": "avx2", "f16c": "f16c",
    "fma": "fma", "bmi2": "bmi2", "avx512": "avx512f", "avx512_vbmi": "avx512_vbmi",
    "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16", "amx_int8": "amx_int8",
    "neon": "asimd", "fp16_va": "asimdhp", "dotprod": "asimddp", "matmul_int8": "i8mm", "sve": "sve",
    "sme": "sme", "sme2": "sme2",
}  # fmt: skip


def check_library_machine(path: Path) -> None:
    """Refuse a shared library that this machine cannot load.

    Raises
    ------
    LibraryError
        It is missing, not an ELF library, or built for another CPU.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
            n_bytes = file.seek(0, 2)
    except OSError as error:
        raise LibraryError(
            f"{path}: native library cannot be read, {error.strerror}; it is built when the package is "
            "installed; run `pip install .` again or set ROTARY_LIBRARY"
        ) from None
    if header[:4] != b"\x7fELF" or len(header) < 64:
        raise LibraryError(f"{path}: not an ELF shared library; expected libggml-rotary.so; build it again")
    order = "<" if header[5] == 1 else ">"
    (number,) = struct.unpack_from(order + "H", header, 18)
    built = _ELF_MACHINES.get(number, f"machine {number}")
    here = platform.machine().lower()
    here = _ALIASES.get(here, here)
    if built != here:
        raise LibraryError(
            f"{path}: built for {built}, this machine is {here}; a library runs on its own CPU only; "
            "build it here with `pip install .`"
        )
    if header[4] == 2:  # 64 bits: the section headers come last; dlopen of a truncated file may die of SIGBUS
        (sections,) = struct.unpack_from(order + "Q", header, 40)
        entry_bytes, n_entries = struct.unpack_from(order + "HH", header, 58)
        if sections + entry_bytes * n_entries > n_bytes:
            raise LibraryError(
                f"{path}: truncated, {n_bytes} bytes; its header announces "
                f"{sections + entry_bytes * n_entries}; build it again with `pip install .`"
            )


def cpu_flags() -> frozenset[str]:
    """Feature flags of the CPU as the kernel names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def available_memory() -> int | None:
    """Bytes of memory that a process can still take: the kernel's estimate, capped by the cgroup's limit."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(Path(limit_file).read_text()) - int(Path(usage_file).read_text())
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        available = min(available, max(left, 0))
    return available


def memlock_limit() -> int | None:
    """Bytes this process may page-lock; None if unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def busy_seconds(*, user: bool = True) -> float:
    """Of all processors so far, with what a hypervisor took; not of programs themselves without `user`."""
    times = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    own, nice, system, _, _, irq, softirq, steal = map(int, times)
    return (user * (own + nice) + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
