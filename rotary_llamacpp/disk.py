# SPDX-License-Identifier: MIT
"""How fast the disk is read past the page cache, and what that takes of the processors."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .machine import busy_seconds

_SAMPLE_BYTES = 256 << 20
_SAMPLE_SECONDS = 2.0
_BLOCK_BYTES = 1 << 20
_READERS = 4


@dataclass(frozen=True)
class ColdRead:
    """What was read past the page cache, how, and in what time; `busy` seconds of processors went to it."""

    n_bytes: int
    seconds: float
    busy: float
    how: str

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.n_bytes / max(self.seconds, 1e-9)


def measure(model: Path | None) -> tuple[ColdRead, Path]:
    """Read a file, or a temporary one if None; and the file, or the folder of that."""
    if model:
        return read_cold(model), model
    with tempfile.TemporaryDirectory(prefix="rotary-disk-") as folder:
        path = Path(folder, "sample")
        deadline = time.monotonic() + _SAMPLE_SECONDS
        block = os.urandom(_BLOCK_BYTES)
        with path.open("wb") as file:
            while file.tell() < _SAMPLE_BYTES and time.monotonic() < deadline:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return read_cold(path), Path(tempfile.gettempdir())


def read_cold(path: Path) -> ColdRead:
    """Read up to 256 MiB of a file, for at most 2 s, past the page cache, as paging does: a few at a time."""
    try:
        descriptor, how = os.open(path, os.O_RDONLY | os.O_DIRECT), "direct"
    except OSError:  # a file system without O_DIRECT, such as tmpfs
        descriptor, how = os.open(path, os.O_RDONLY), "cache dropped"
        os.posix_fadvise(descriptor, 0, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
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
        with ThreadPoolExecutor(_READERS) as pool:
            busy = busy_seconds(user=False)
            start = time.monotonic()
            readers = [pool.submit(read) for _ in range(_READERS)]
            n_bytes = sum(reader.result() for reader in readers)
            return ColdRead(n_bytes, time.monotonic() - start, busy_seconds(user=False) - busy, how)
    finally:
        os.close(descriptor)
