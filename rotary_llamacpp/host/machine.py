# SPDX-License-Identifier: MIT
"""CPUs and memory that this process may use, and the CPU that a library was built for. Loads nothing."""

from __future__ import annotations

import math
import os
import resource
import struct
from pathlib import Path

from ..errors import LibraryError
from . import cgroups
from .cgroups import HERE

# e_machine in an ELF header, only for messages.
_ELF_MACHINES = {3: "i386", 21: "ppc64le", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_PROGRAM = Path("/proc/self/exe")
HOST_PID_NAMESPACE = 0xEFFFFFFC  # inode, fixed by the kernel's ABI (PROC_PID_INIT_INO)


def _elf_target(header: bytes) -> tuple[int, int, int]:
    """Word size, byte order and machine in an ELF header of 64 bytes."""
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
    # Compare with Python's own binary, because uname may name a 64-bit kernel under 32-bit programs.
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


def installed_memory(root: Path = HERE) -> int | None:
    """Bytes of memory of the machine, regardless of cgroups."""
    found = cgroups.read_fields(root / "proc" / "meminfo").get("MemTotal:")
    return None if found is None else found << 10


def total_memory(root: Path = HERE) -> int | None:
    """Bytes of memory of the machine, or the tightest limit of the cgroups around this process."""
    return _memory(root)[0]


def available_memory(root: Path = HERE) -> int | None:
    """Bytes that this process can still take without swapping, page cache counted as free.

    The kernel's estimate, or what the tightest of the cgroups around this process leaves, as the native
    library computes it. /proc and the mounts of cgroups are below `root`.
    """
    return _memory(root)[1]


def _memory(root: Path) -> tuple[int | None, int | None]:
    meminfo = cgroups.read_fields(root / "proc" / "meminfo")
    installed, available = (
        meminfo[name] << 10 if name in meminfo else math.inf for name in ("MemTotal:", "MemAvailable:")
    )
    total = installed
    for group in cgroups.own_groups("memory", root):
        for folder in group.folders:
            is_own = folder == group.folders[0]
            if not is_own and cgroups.read_number(folder / "memory.use_hierarchy") == 0:
                break  # in version 1, this group and those around it are not charged for groups inside
            limit = _memory_limit(folder, group.version, is_own)
            if limit < installed:  # in version 1, no limit is a huge number
                total = min(total, limit)
                available = min(available, max(0, limit - _memory_taken(folder, group.version)))
    return (None if total == math.inf else int(total)), (None if available == math.inf else int(available))


def _memory_limit(folder: Path, version: int, is_own: bool) -> float:
    if version == 2:  # above memory.high, processes are throttled until they hardly run
        found = [cgroups.read_number(folder / name) for name in ("memory.max", "memory.high")]
    else:
        found = [cgroups.read_number(folder / "memory.limit_in_bytes")]
        if is_own:  # includes limits of groups around it that a container does not see
            found.append(cgroups.read_fields(folder / "memory.stat").get("hierarchical_memory_limit"))
    return min((limit for limit in found if limit is not None), default=math.inf)


def _memory_taken(folder: Path, version: int) -> int:
    """Bytes charged to a group without file pages, which are reclaimed before the limit is reached."""
    usage, prefix = ("memory.current", "") if version == 2 else ("memory.usage_in_bytes", "total_")
    stat = cgroups.read_fields(folder / "memory.stat")
    cached = sum(stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))
    return max(0, (cgroups.read_number(folder / usage) or 0) - cached)


def cpu_count(root: Path = HERE) -> int:
    """Number of CPUs that this process may keep busy: by affinity, and by the quotas of cgroups.

    At least 1. Fractions of a CPU are dropped, because a team of threads waits for the one that is throttled.
    The native library counts the same way.
    """
    quota = cpu_quota(root)
    return allowed_cpus() if quota is None else max(1, min(allowed_cpus(), quota))


def allowed_cpus() -> int:
    """Number of CPUs that this process may run on, by affinity and cpusets."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def cpu_quota(root: Path = HERE) -> int | None:
    """Number of whole CPUs in the tightest quota of the cgroups around this process; None without a quota."""
    quotas = []
    for group in cgroups.own_groups("cpu", root):
        for folder in group.folders:
            if group.version == 1:
                quota = cgroups.read_number(folder / "cpu.cfs_quota_us")
                period = cgroups.read_number(folder / "cpu.cfs_period_us")
            else:
                words = cgroups.read(folder / "cpu.max").split()
                quota, period = map(cgroups.number, [*words, "", ""][:2])
            if quota is not None and period:
                quotas.append(quota // period)
    return min(quotas, default=None)


def memlock_limit() -> int | None:
    """Bytes this process may page-lock; None if unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def busy_seconds(*, user: bool = True, root: Path = HERE) -> float | None:
    """Seconds that the CPUs this process may use have been busy, including time a hypervisor took.

    Without `user`, time in user mode is left out. None where the time cannot be known: in a container,
    /proc/stat counts other tenants of the host too.
    """
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        namespace = os.readlink(root / "proc" / "self" / "ns" / "pid")
    except (AttributeError, OSError):
        return None
    rows = [line.split() for line in cgroups.read(root / "proc" / "stat").splitlines()]
    times = [[int(each) for each in row[1:9]] for row in rows if row and row[0] in allowed and len(row) > 8]
    if namespace != f"pid:[{HOST_PID_NAMESPACE}]" or not times:
        return None
    own, nice, system, _, _, irq, softirq, steal = map(sum, zip(*times, strict=True))
    return (user * (own + nice) + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def kernel_seconds() -> float:
    """Seconds of kernel time that this process's own calls took."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime
