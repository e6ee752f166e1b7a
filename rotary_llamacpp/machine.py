# SPDX-License-Identifier: MIT
"""What this machine is: its CPU and memory, and which CPU a shared library was built for. Loads nothing."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

from .errors import LibraryError

# e_machine in an ELF header, for messages alone.
_ELF_MACHINES = {3: "i386", 21: "ppc64le", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_PROGRAM = Path("/proc/self/exe")


def _elf_target(header: bytes) -> tuple[int, int, int]:
    """Word size, byte order and machine of what an ELF header of 64 bytes begins."""
    return header[4], header[5], int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")


def _named(target: tuple[int, int, int]) -> str:
    return f"{_ELF_MACHINES.get(target[2], f'ELF machine {target[2]}')} of {32 * target[0]} bits"


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
    # Python itself says what runs here: uname may name a 64-bit kernel under 32-bit programs.
    try:
        with _PROGRAM.open("rb") as file:
            here = _elf_target(file.read(64))
    except OSError:
        here = _elf_target(header)
    if _elf_target(header) != here:
        raise LibraryError(
            f"{path}: built for {_named(_elf_target(header))}, this Python is {_named(here)}; a library runs "
            "on its own CPU only; build it here with `pip install .`"
        )
    order = "<" if header[5] == 1 else ">"
    if header[4] == 2:  # 64 bits: the section headers come last; dlopen of a truncated file may die of SIGBUS
        (sections,) = struct.unpack_from(order + "Q", header, 40)
        entry_bytes, n_entries = struct.unpack_from(order + "HH", header, 58)
        if sections + entry_bytes * n_entries > n_bytes:
            raise LibraryError(
                f"{path}: truncated, {n_bytes} bytes; its header announces "
                f"{sections + entry_bytes * n_entries}; build it again with `pip install .`"
            )


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
