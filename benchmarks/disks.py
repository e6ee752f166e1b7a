# SPDX-License-Identifier: MIT
"""Disks to measure on: their devices, read-ahead and plain bandwidth, and a fast one made of memory.

Linux only; making a disk and setting read-ahead need root.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cgroups import join
from rotary_llamacpp.units import MIB

_CLONE_NEWNS = 0x00020000  # sched.h


def block_device(path: Path) -> Path | None:
    """/sys directory of the whole disk (not the partition) that holds a file; None if there is none.

    A file system without a block device (tmpfs, btrfs, overlay) has an anonymous device number, major 0.
    """
    number = os.stat(path).st_dev
    found = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not found.exists():
        return None
    found = found.resolve()
    return found.parent if (found / "partition").exists() else found


def get_read_ahead(device: Path) -> int:
    """The device's read-ahead in KiB."""
    return int((device / "queue" / "read_ahead_kb").read_text())


def set_read_ahead(device: Path, kib: int) -> None:
    """Set the device's read-ahead in KiB; it applies to files that are opened later."""
    (device / "queue" / "read_ahead_kb").write_text(str(kib))


@contextlib.contextmanager
def kept_read_ahead(device: Path) -> Iterator[int]:
    """Yield the read-ahead in KiB, and restore it at the end."""
    own = get_read_ahead(device)
    try:
        yield own
    finally:
        set_read_ahead(device, own)


def drop(path: Path) -> None:
    """Drop a file from the page cache; no process may have it mapped."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # dirty pages would stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def fill_cache(path: Path) -> None:
    """Read a file into the page cache."""
    buffer = bytearray(8 * MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


@dataclass
class Disk:
    """A disk from which models are read."""

    name: str
    what: str
    folder: Path
    device: Path | None  # in /sys
    throttle: tuple[str, int] | None = None  # see cgroups.group
    own_read_ahead: int | None = None  # KiB; None if it cannot be set
    holds_one: bool = False  # only one model fits at a time, which is copied there
    bandwidth: float | None = None  # bytes per second of the plain reader

    def place(self, model: Path) -> Path:
        """Path of the model on this disk, where it is copied if necessary."""
        path = self.folder / model.name
        if self.holds_one and not path.exists():
            for other in self.folder.glob("*.gguf"):
                other.unlink()
            shutil.copyfile(model, path)
            drop(path)
            drop(model)
        return path


def plain_reader(
    path: str, seconds: float = 3.0, in_flight: int = 8, block_bytes: int = MIB, groups: tuple[str, ...] = ()
) -> dict:
    """Measure the disk's bandwidth for a plain parallel reader: O_DIRECT reads at random offsets.

    Parameters
    ----------
    path : str
        File to read.
    in_flight : int
        Number of threads, each with one read in flight.
    block_bytes : int
        Size and alignment of a read.
    groups : sequence of str
        ``cgroup.procs`` files of a group to join first, to be throttled with it.

    Returns
    -------
    dict
        ``bandwidth`` in bytes per second, ``reads``.
    """
    join(groups)
    blocks = os.path.getsize(path) // block_bytes
    if blocks == 0:
        raise OSError(f"{path}: smaller than one read of {block_bytes} bytes; read a larger file")
    done: list[tuple[int, float]] = []
    errors: list[OSError] = []
    begin = time.perf_counter()

    def read(seed: int) -> None:
        order = random.Random(seed)
        n_bytes = 0
        try:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, block_bytes) as buffer:  # page-aligned, as O_DIRECT requires
                    while time.perf_counter() - begin < seconds:
                        n_bytes += os.preadv(file, [buffer], order.randrange(blocks) * block_bytes)
            finally:
                os.close(file)
        except OSError as error:
            errors.append(error)
        done.append((n_bytes, time.perf_counter()))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    total = sum(n_bytes for n_bytes, _ in done)
    return {"bandwidth": total / (max(end for _, end in done) - begin), "reads": total // block_bytes}


def _own_mounts() -> None:
    """Give this process a mount namespace: later mounts are seen only here, and end with the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mount namespace: {os.strerror(error)}")
    _command("mount", "--make-rprivate", "/")


def _command(*arguments: object) -> None:
    try:
        subprocess.run([str(a) for a in arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()) or f"status {error.returncode}"
        raise OSError(f"{arguments[0]}: {said}") from None


@contextlib.contextmanager
def fast_disk(n_bytes: int) -> Iterator[Path]:
    """Mount an ext4 for `n_bytes` of files on a loop device over a new tmpfs; yields its folder.

    The memory is charged to this process. The mounts are private, so that they and the loop device disappear
    even if the process is killed.

    Raises
    ------
    OSError
        Memory, loop devices, mkfs.ext4 or the right to mount are missing; the message says which.
    """
    size = n_bytes + n_bytes // 32 + 32 * MIB  # the file system's own blocks included
    _own_mounts()
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rotary-bench-")))
        memory, folder = base / "memory", base / "disk"
        memory.mkdir()
        folder.mkdir()
        _command("mount", "-t", "tmpfs", "-o", f"size={size + 16 * MIB},mode=700", "rotary-bench", memory)
        stack.callback(_command, "umount", memory)
        image = memory / "image"
        with image.open("wb") as file:
            file.truncate(size)
        # No journal and no lazy initialisation: nothing writes in the background.
        _command(
            "mkfs.ext4",
            "-q",
            "-F",
            "-m",
            "0",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=0,nodiscard",
            image,
        )
        _command("mount", "-o", "loop,noatime", image, folder)
        stack.callback(_command, "umount", folder)  # frees the loop device, which mount set to autoclear
        yield folder
