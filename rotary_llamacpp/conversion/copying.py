# SPDX-License-Identifier: MIT
"""Copies the bytes of planned files in constant memory; resumable, and files get their names once complete.

The kernel copies from file to file, or the calling thread through one buffer where the kernel cannot. A
second thread syncs what was copied and journals the position only then, so that the journal is true even
after a power cut, and the disk writes while the next bytes are copied.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, RotaryError
from ..gguf_files.header import read_header
from ..gguf_files.layout import Layout, Output
from ..units import MIB
from .journal import Journal, part

CHUNK_BYTES = 32 * MIB  # copied between two checks for signals
_BUFFER_BYTES = 8 * MIB  # for copying where the kernel cannot
_NOTE_BYTES = 256 * MIB  # copied between two journal entries
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)

Progress = Callable[[int], object]  # gets the number of bytes done since the last call


@dataclass(frozen=True)
class _Move:
    """Copies `n_bytes` from offset `at` of a source, by number, to offset `to` of the result."""

    source: int
    at: int
    to: int
    n_bytes: int


def moves(output: Output, done: int = 0) -> Iterator[_Move]:
    """Moves that remain when the first `done` bytes of a file are written."""
    for weight, at in output.weights:
        to = at
        for piece in weight.pieces:
            missing = max(0, done - to)
            if missing < piece.n_bytes:
                yield _Move(piece.source, piece.offset + missing, to + missing, piece.n_bytes - missing)
            to += piece.n_bytes


# ---- copying -----------------------------------------------------------------------------------------


class _Copier:
    """Copies ranges between open files."""

    def __init__(self) -> None:
        self.kernel = True
        self._buffer: memoryview | None = None

    def move(self, source: int, result: int, move: _Move) -> int:
        """Copy the beginning of a range; return the bytes copied, 0 where the source ends."""
        n_bytes = min(move.n_bytes, CHUNK_BYTES)
        if self.kernel:
            try:
                moved = os.copy_file_range(source, result, n_bytes, move.at, move.to)
                if moved:
                    return moved
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
            # Some file systems copy nothing instead of failing; the end of the source is noticed below.
            self.kernel = False
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        n_read = os.preadv(source, [self._buffer[:n_bytes]], move.at)
        done = 0
        while done < n_read:
            done += os.pwrite(result, self._buffer[done:n_read], move.to + done)
        return n_read


class _Durable(threading.Thread):
    """Syncs a file while it is written, and journals how many of its bytes are durable."""

    def __init__(self, fd: int, number: int, journal: Journal, begin: int) -> None:
        super().__init__(name="rotary-sync", daemon=True)
        self.fd, self.number, self.journal = fd, number, journal
        self.copied = self.noted = begin
        self.error: OSError | None = None
        self._ending = False
        self._more = threading.Condition()

    def run(self) -> None:
        try:
            while self._wait():
                copied = self.copied
                os.fdatasync(self.fd)
                self.journal.note(self.number, copied)
                self.noted = copied
        except OSError as error:
            self.error = error

    def _wait(self) -> bool:
        with self._more:
            self._more.wait_for(lambda: self._ending or self.copied - self.noted >= _NOTE_BYTES)
            return self.copied > self.noted

    def reached(self, n_bytes: int) -> None:
        """Report that the first `n_bytes` of the file are copied."""
        if self.error:
            raise self.error
        with self._more:
            self.copied = n_bytes
            self._more.notify()

    def end(self) -> None:
        """Sync and journal the rest."""
        with self._more:
            self._ending = True
            self._more.notify()
        self.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@contextlib.contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open(path, "rb", buffering=0)).fileno() for path in paths]


def copy(
    layout: Layout, sources: Sequence[Path], journal: Journal, progress: Progress = lambda _: None
) -> None:
    """Write the files of `layout` under their temporary names, from the durable position in `journal` on.

    Raises
    ------
    ModelError
        A source has become shorter.
    OSError
        A file cannot be read or written.
    """
    with _opened(sources) as fds:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        copier = _Copier()
        for number, output in enumerate(layout.outputs):
            file, done = journal.done
            if number < file:
                progress(output.n_bytes)
                continue
            _copy_one(output, number, done if number == file else 0, fds, sources, copier, journal, progress)


def _copy_one(
    output: Output, number: int, done: int, fds: Sequence[int], sources: Sequence[Path], copier: _Copier,
    journal: Journal, progress: Progress,
) -> None:  # fmt: skip
    fd = os.open(part(output.path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        if done == 0:
            os.ftruncate(fd, 0)
            # Reserve space now, so that a full disk fails at once; bytes that are not written read as zeros.
            try:
                os.posix_fallocate(fd, 0, output.n_bytes)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                os.ftruncate(fd, output.n_bytes)
            _write_all(fd, output.header)
            done = len(output.header)
        progress(done)
        with _Durable(fd, number, journal, done) as durable:
            for move in moves(output, done):
                left = move
                while left.n_bytes:
                    n_bytes = copier.move(fds[left.source], fd, left)
                    if n_bytes == 0:
                        raise ModelError(
                            f"{sources[left.source]}: ends at byte {left.at}, {left.n_bytes} bytes early; "
                            "it changed while it was converted; convert it again"
                        )
                    left = _Move(left.source, left.at + n_bytes, left.to + n_bytes, left.n_bytes - n_bytes)
                    progress(left.to - done)  # padding included
                    done = left.to
                    durable.reached(done)
            progress(output.n_bytes - done)
            durable.reached(output.n_bytes)
        if durable.error:
            raise durable.error
        os.fsync(fd)
        journal.note(number + 1, 0)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], at)


# ---- after copying -----------------------------------------------------------------------------------


def check_headers(layout: Layout) -> None:
    """Read the headers back, with the reader that is used for every model.

    Raises
    ------
    RotaryError
        A header differs from what was planned.
    """
    for output in layout.outputs:
        header = read_header(part(output.path))
        found = [(t.name, t.shape, t.type_number, t.offset) for t in header.tensors]
        planned = [(w.name, w.shape, w.type_number, at) for w, at in output.weights]
        if found != planned or header.n_bytes != output.n_bytes:
            raise RotaryError(
                f"{output.path}: {len(found)} tensors in {header.n_bytes} bytes were written, {len(planned)} "
                f"in {output.n_bytes} planned; check the disk"
            )


def verify(layout: Layout, sources: Sequence[Path], progress: Progress = lambda _: None) -> None:
    """Read every tensor again, from the disk where the system allows, and compare it with its source.

    Raises
    ------
    RotaryError
        A tensor differs.
    """
    buffers = (np.empty(_BUFFER_BYTES, np.uint8), np.empty(_BUFFER_BYTES, np.uint8))
    with _opened(sources) as fds:
        for output in layout.outputs:
            with _opened([part(output.path)]) as (fd,):
                with contextlib.suppress(OSError):  # else the copy would be read from memory
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                for move in moves(output):
                    _compare(output, fd, move, fds[move.source], sources[move.source], buffers, progress)


def _compare(
    output: Output, fd: int, move: _Move, source_fd: int, source: Path,
    buffers: tuple[NDArray[np.uint8], NDArray[np.uint8]], progress: Progress,
) -> None:  # fmt: skip
    ours, theirs = buffers
    for begin in range(0, move.n_bytes, _BUFFER_BYTES):
        n_bytes = min(_BUFFER_BYTES, move.n_bytes - begin)
        _soon(fd, move.to + begin + n_bytes)
        _soon(source_fd, move.at + begin + n_bytes)
        n_ours = _read_into(fd, ours[:n_bytes], move.to + begin)
        n_theirs = _read_into(source_fd, theirs[:n_bytes], move.at + begin)
        if n_ours != n_theirs or not np.array_equal(ours[:n_ours], theirs[:n_ours]):
            name = next(w.name for w, at in output.weights if move.to < at + w.n_bytes)
            raise RotaryError(
                f"{output.path}: {name} differs from {source} within {n_bytes} bytes from "
                f"{move.to + begin}; check disk and memory, and try again"
            )
        progress(n_bytes)


def _soon(fd: int, at: int) -> None:
    """Let the disk read the next blocks while these are compared; the kernel's own read-ahead is short."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, at, 2 * _BUFFER_BYTES, os.POSIX_FADV_WILLNEED)


def _read_into(fd: int, view: NDArray[np.uint8], at: int) -> int:
    done = 0
    while done < len(view) and (n_bytes := os.preadv(fd, [view[done:].data], at + done)):
        done += n_bytes
    return done


def give_names(layout: Layout, *, force: bool = False) -> None:
    """Rename the complete files, the first shard last.

    If a file cannot be renamed, those already renamed are removed, unless they replaced a file.

    Raises
    ------
    RotaryError
        A file of that name exists, and `force` is not given; or only some files were replaced.
    OSError
        A file cannot be renamed.
    """
    made: list[Path] = []
    replaced: list[Path] = []
    try:
        for output in reversed(layout.outputs):
            exists = os.path.lexists(output.path)
            if exists and not force:
                raise RotaryError(
                    f"{output.path}: appeared during the conversion; give --force, or another name"
                )
            os.replace(part(output.path), output.path)
            (replaced if exists else made).append(output.path)
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if replaced:
            raise RotaryError(
                f"{output.path}: cannot be replaced, {error}; {len(replaced)} of {len(layout.outputs)} files "
                "were, so the old model is lost; convert again"
            ) from error
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(layout.outputs[0].path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP, if this is the main thread, to which Python delivers them.

    A signal mask would not do: another thread would take the signal, and Python would interrupt this one.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if (handler := signal.getsignal(number)) is not None:  # None: not set by Python
                    before[number] = handler
                    signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
