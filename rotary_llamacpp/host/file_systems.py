# SPDX-License-Identifier: MIT
"""Tells kinds of file systems apart, as far as reading is concerned. Linux only.

Asks statfs, because overlays and subvolumes have device numbers that are in no list of mounts.
Source: statfs(2), linux/magic.h, Documentation/filesystems/proc.rst (/proc/<pid>/io).
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from . import cgroups

_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}
# Reads may be served from a server's memory, and the kernel does not count them.
_REMOTE = {
    0x00006969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB", 0x65735546: "FUSE", 0x01021997: "9p",
    0x00C36400: "Ceph", 0x0BD00BD0: "Lustre", 0x47504653: "GPFS",
}  # fmt: skip
# The kernel counts what a process reads from storage here.
_COUNTED = {
    0x0000EF53: "ext4", 0x58465342: "XFS", 0x9123683E: "Btrfs", 0xF2F52010: "F2FS", 0x794C7630: "overlay",
}  # fmt: skip


def in_memory(path: Path) -> str | None:
    """Name of the file system if it keeps files in memory only, else None."""
    return _IN_MEMORY.get(magic(path))


def remote(path: Path) -> str | None:
    """Name of the file system if another process or machine answers reads, else None."""
    return _REMOTE.get(magic(path))


def storage_reads(path: Path) -> int | None:
    """Bytes that this process has read from storage so far; None if reads of `path` are not counted."""
    return cgroups.read_fields(Path("/proc/self/io")).get("read_bytes:") if magic(path) in _COUNTED else None


def magic(path: Path) -> int:
    """The kernel's magic number of a path's file system; 0 if it cannot be found out.

    Raises
    ------
    OSError
        The path does not exist, or may not be accessed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    about = ctypes.create_string_buffer(512)  # struct statfs, of about 120 bytes, begins with the number
    if not hasattr(libc, "statfs"):
        return 0
    if libc.statfs(os.fsencode(path), about) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(path))
    kind = ctypes.c_uint32 if platform.machine() == "s390x" else ctypes.c_ulong
    return int(kind.from_buffer(about).value) & 0xFFFFFFFF
