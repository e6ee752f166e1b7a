# SPDX-License-Identifier: MIT
"""Measures how fast a disk is read past the page cache, and how much processor time that takes.

A file in memory is refused, not measured as if it were on a disk.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import RotaryError
from ..units import MIB, mib
from . import file_systems
from .machine import busy_seconds, kernel_seconds

_SAMPLE_BYTES = 256 * MIB
_SAMPLE_SECONDS = 2.0
_BLOCK_BYTES = MIB
_READERS = 4


@dataclass(frozen=True)
class ColdRead:
    """A read past the page cache: its bytes, method and time, and the `busy` seconds of processors."""

    n_bytes: int
    seconds: float
    busy: float
    how: str
    own: bool = False  # `busy` is of this process alone: in a container, the machine's includes other tenants

    @property
    def rate(self) -> float:
        """Bytes read per second."""
        return self.n_bytes / max(self.seconds, 1e-9)


def measure(model: Path | None) -> tuple[ColdRead, Path]:
    """Read a model, or a temporary file if None; return the result and the model, or the file's folder.

    Raises
    ------
    RotaryError
        The disk cannot be measured there, or, for a temporary file, in any folder that may be written.
    OSError
        The file cannot be read.
    """
    if model:
        return read_cold(model), model
    refused = []
    for folder in _folders():
        try:
            return _read_sample(folder), folder
        except RotaryError as error:
            refused.append(str(error).rpartition("; ")[0])
        except OSError as error:
            refused.append(f"{folder}: {error.strerror}")
    raise RotaryError(
        f"disk: a temporary file cannot be measured, {', '.join(refused)}; {mib(_SAMPLE_BYTES, 0)} are "
        "written and read; name a model to read instead"
    )


def _folders() -> Iterator[Path]:
    """Folders for a temporary file; several, because /tmp lies in memory on many systems."""
    seen = set()
    for name in (tempfile.gettempdir(), "/var/tmp", Path.home(), Path.cwd()):
        if (folder := Path(name)).is_dir() and folder not in seen:
            seen.add(folder)
            yield folder


def _read_sample(folder: Path) -> ColdRead:
    if name := file_systems.in_memory(folder):
        raise _in_memory(folder, name)
    about = os.statvfs(folder)
    if (free := about.f_bavail * about.f_frsize) < 2 * _SAMPLE_BYTES:
        raise RotaryError(f"{folder}: {mib(free, 0)} are free; make room")
    # The file has no name, so that it ends with this process.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        deadline = time.monotonic() + _SAMPLE_SECONDS
        block = os.urandom(_BLOCK_BYTES)
        while file.tell() < _SAMPLE_BYTES and time.monotonic() < deadline:
            file.write(block)
        os.fsync(file.fileno())
        path = Path(f"/proc/self/fd/{file.fileno()}")
        try:
            return read_cold(path)
        except RotaryError as error:
            raise RotaryError(str(error).replace(str(path), f"a file in {folder}")) from None


def read_cold(path: Path) -> ColdRead:
    """Read up to 256 MiB of a file past the page cache, for at most 2 s, a few blocks at a time.

    Raises
    ------
    RotaryError
        The file is in memory, empty, or not a regular file.
    OSError
        The file cannot be read.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size == 0:
        what = "empty" if stat.S_ISREG(about.st_mode) else "not a file"
        raise RotaryError(f"{path}: {what}; name a model to measure the disk with")
    if name := file_systems.in_memory(path):
        raise _in_memory(path, name)
    before = file_systems.storage_reads(path)
    found = _read_direct(path) or _read(path, os.open(path, os.O_RDONLY), "cache dropped")
    after = file_systems.storage_reads(path)
    if before is not None and after is not None and after - before < found.n_bytes / 2:
        raise RotaryError(
            f"{path}: of {mib(found.n_bytes, 0)}, {mib(after - before, 0)} came from storage "
            "and the rest from memory; measure while no program has the file open"
        )
    return found


def _in_memory(path: Path, name: str) -> RotaryError:
    return RotaryError(
        f"{path}: lies in memory ({name}), there is no disk to measure; a file there takes memory as long as "
        "it exists; keep models on a disk"
    )


def _read_direct(path: Path) -> ColdRead | None:
    """Read with O_DIRECT; None where the file system refuses to open or to read the file so."""
    try:
        return _read(path, os.open(path, os.O_RDONLY | os.O_DIRECT), "direct")
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return None


def _read(path: Path, descriptor: int, how: str) -> ColdRead:
    numbers = itertools.count()

    def read() -> int:
        n_bytes = 0
        with mmap.mmap(-1, _BLOCK_BYTES) as buffer:  # O_DIRECT wants page-aligned memory
            while (at := next(numbers) * _BLOCK_BYTES) < _SAMPLE_BYTES:
                n_bytes += os.preadv(descriptor, [buffer], at)
                if n_bytes == 0 or time.monotonic() - start > _SAMPLE_SECONDS:
                    break
        return n_bytes

    try:
        if how != "direct":
            os.posix_fadvise(descriptor, 0, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
        own = busy_seconds(user=False) is None

        def busy() -> float:
            found = None if own else busy_seconds(user=False)
            return kernel_seconds() if found is None else found

        with ThreadPoolExecutor(_READERS) as pool:
            before = busy()
            start = time.monotonic()
            readers = [pool.submit(read) for _ in range(_READERS)]
            n_bytes = sum(reader.result() for reader in readers)
            seconds = time.monotonic() - start
        over = file_systems.remote(path)
        return ColdRead(n_bytes, seconds, busy() - before, f"{how}, {over}" if over else how, own)
    finally:
        os.close(descriptor)
