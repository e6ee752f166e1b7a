# SPDX-License-Identifier: MIT
"""Keeps the temporary files and the progress of a conversion, so that it can resume."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RotaryError
from ..gguf_files.layout import Layout

_BEGIN = b'{"subject": '  # how every journal begins


def part(path: Path) -> Path:
    """Path of a file while it is not complete."""
    return path.with_name(path.name + ".part")


def identity(path: Path) -> list[Any]:
    """Path, size and modification time of a file, by which a change is noticed."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def note_path(out: Path) -> Path:
    """Path of the journal of a conversion to `out`."""
    return part(out).with_name(part(out).name + ".json")


def size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _check(names: object, stages: object, layout: object, done: object) -> None:
    """Raise a ValueError for content that no journal has."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("files")
    if not isinstance(stages, dict) or not isinstance(layout, str):
        raise ValueError("stages")
    if (
        not isinstance(done, list)
        or len(done) != 2
        or not all(type(n) is int and 0 <= n < 1 << 63 for n in done)
    ):
        raise ValueError("done")


class Journal:
    """``OUT.part.json``: sources and results of a conversion, and how many bytes of the results are durable.

    The journal is locked, so that two conversions do not write the same files. It lists every temporary file
    before that is made, and removes no other file. It is written in place; a truncated one is still
    recognised as a journal, but cannot be resumed.
    """

    def __init__(self, out: Path, subject: Mapping[str, Any]) -> None:
        self.path = note_path(out)
        self.subject = json.loads(json.dumps(subject))
        self.done = [0, 0]  # number of the file being written, and its durable bytes
        self.stale = False  # a journal of another conversion was found
        self._stages: dict[str, Any] = {}  # identities of complete temporary inputs, by name
        self._layout = ""  # digest of the layout that `done` counts bytes of
        self._files: set[str] = set()  # names of temporary files
        self._cut_off = False
        self._fd: int | None = self._open(out)
        try:
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self, out: Path) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise RotaryError(
                    f"{out}: being converted by another process, which holds {self.path.name}; "
                    "wait for it, or give another name"
                ) from None
            except OSError:  # a file system without locks
                return fd
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
            os.close(fd)  # the holder removed the file after we had opened it

    def _read(self) -> None:
        assert self._fd is not None
        raw = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if not raw:
            return
        if not raw.startswith(_BEGIN):
            raise RotaryError(
                f"{self.path}: exists and is not the journal of a conversion; "
                "move it away, or give another name"
            )
        self.stale = True
        try:
            found = json.loads(raw)
            names, stages, layout, done = (found[key] for key in ("files", "stages", "layout", "done"))
            _check(names, stages, layout, done)
        except (ValueError, KeyError, TypeError, RecursionError):
            self._cut_off = True
            return
        files = {name for name in names if name.endswith(".part") and Path(name).name == name}
        if found["subject"] == self.subject:
            self.stale, self._files = False, files
            self._stages, self._layout, self.done = stages, layout, done
        else:
            self._remove(files)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.path.with_name(name).unlink(missing_ok=True)

    def claim(self, paths: Collection[Path]) -> None:
        """Register temporary files as those of this conversion.

        Raises
        ------
        RotaryError
            A file of that name exists that no conversion made.
        """
        for path in paths:
            if os.path.lexists(path) and path.name not in self._files and not self._cut_off:
                raise RotaryError(
                    f"{path}: exists, and no conversion made it; move it away, or give another name"
                )
        self._files |= {path.name for path in paths}
        self.write()

    def has(self, path: Path) -> bool:
        """Whether a temporary input is complete and unchanged."""
        return path.is_file() and self._stages.get(path.name) == identity(path)

    def finish(self, path: Path) -> None:
        """Make a temporary input durable, and note that it is complete."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._stages[path.name] = identity(path)
        self.write()

    @property
    def resumable(self) -> bool:
        """Whether finished work can be reused."""
        return self.done != [0, 0] or bool(self._stages)

    def begin(self, layout: Layout) -> None:
        """Let `done` count bytes of this layout; start at 0 unless the temporary files have this layout."""
        digest = hashlib.sha256()
        for output in layout.outputs:
            digest.update(os.fsencode(f"{output.path.name}\n{output.n_bytes}\n") + output.header)
        complete = (size(part(output.path)) == output.n_bytes for output in layout.outputs)
        n_needed = min(self.done[0] + (self.done[1] > 0), len(layout.outputs))
        if self._layout != digest.hexdigest() or not all(itertools.islice(complete, n_needed)):
            self.done = [0, 0]
        self._layout = digest.hexdigest()
        self.claim([part(output.path) for output in layout.outputs])

    def note(self, file: int, n_bytes: int) -> None:
        """Note that the first `n_bytes` of a file are durable, and all files before it."""
        self.done = [file, n_bytes]
        self.write()

    def write(self) -> None:
        """Write the journal, durably."""
        assert self._fd is not None
        known = {
            "subject": self.subject, "stages": self._stages, "layout": self._layout,
            "files": sorted(self._files), "done": self.done,
        }  # fmt: skip
        raw = json.dumps(known).encode()
        os.pwrite(self._fd, raw, 0)
        os.ftruncate(self._fd, len(raw))
        os.fsync(self._fd)

    def close(self, *, remove: bool) -> None:
        """Unlock the journal; `remove` it and all temporary files if nothing is to be resumed. Idempotent."""
        if self._fd is None:
            return
        if remove:
            self._remove(self._files)
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None
