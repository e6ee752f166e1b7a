# SPDX-License-Identifier: MIT
"""Temporary files of a conversion and the note of how far it is, so that an interrupted one goes on."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RotaryError
from .gguf_layout import Layout


def part(path: Path) -> Path:
    """The name of a file that is not whole yet."""
    return path.with_name(path.name + ".part")


def identity(path: Path) -> list[Any]:
    """What tells that a file is still the same: its path, bytes and time of change."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def note_path(out: Path) -> Path:
    """Where the journal of a conversion to `out` is."""
    return part(out).with_name(part(out).name + ".json")


def exists(out: Path) -> bool:
    """Whether a conversion to `out` can go on."""
    return note_path(out).exists()


class Journal:
    """``OUT.part.json``: what is being made out of what, and how many bytes of it are durable.

    Held locked, so that two conversions do not write the same files. Written in place; one that is cut off is
    no JSON, and counts as none.
    """

    def __init__(self, out: Path, subject: Mapping[str, Any]) -> None:
        self.path = note_path(out)
        self.subject = json.loads(json.dumps(subject))
        self.stages: dict[str, Any] = {}  # temporary inputs that are whole, by name
        self.done = [0, 0]  # file, bytes of it
        self.stale = False  # another conversion's was found
        self._layout = ""  # digest of what `done` is of
        self._files: list[str] = []  # under temporary names
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise RotaryError(
                f"{out}: being converted by another process, which holds {self.path.name}; "
                "one at a time; wait for it or give another name"
            ) from None
        self._read()

    def _read(self) -> None:
        raw = os.pread(self._fd, 1 << 20, 0)
        try:
            found = json.loads(raw)
            same = found["subject"] == self.subject
            stages, layout, (file, n_bytes) = dict(found["stages"]), found["layout"], found["done"]
            self._files = [name for name in found["files"] if name.endswith(".part")]
        except (ValueError, KeyError, TypeError):
            self.stale = bool(raw)
            return
        if same:
            self.stages, self._layout, self.done = stages, layout, [int(file), int(n_bytes)]
        self.stale = not same

    def begin(self, layout: Layout) -> None:
        """From here on `done` is of this layout; from its start, unless its files are there so far."""
        digest = hashlib.sha256()
        for output in layout.outputs:
            digest.update(f"{output.path}\n{output.n_bytes}\n".encode() + output.header)
        there = (size(part(output.path)) == output.n_bytes for output in layout.outputs)
        n_needed = self.done[0] + (self.done[1] > 0)
        if self._layout != digest.hexdigest() or not all(itertools.islice(there, n_needed)):
            self.done = [0, 0]
        self._layout = digest.hexdigest()
        mine = [str(part(output.path)) for output in layout.outputs]
        for path in set(self._files) - set(mine):  # of the conversion that was begun before
            Path(path).unlink(missing_ok=True)
        self._files = mine

    def note(self, file: int, n_bytes: int) -> None:
        """The first `n_bytes` of this file are durable, and all files before."""
        self.done = [file, n_bytes]
        self.write()

    def write(self) -> None:
        """Make what is known durable."""
        known = {
            "subject": self.subject, "stages": self.stages, "layout": self._layout, "files": self._files,
            "done": self.done,
        }  # fmt: skip
        raw = json.dumps(known).encode()
        os.pwrite(self._fd, raw, 0)
        os.ftruncate(self._fd, len(raw))
        os.fsync(self._fd)

    def close(self, *, remove: bool) -> None:
        """Let go of it; `remove` it where nothing is left to resume."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def missing_bytes(layout: Layout) -> int:
    """Disk space that is still to be taken."""
    return sum(max(0, output.n_bytes - size(part(output.path))) for output in layout.outputs)


def size(path: Path) -> int:
    """0 where there is no file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove_parts(layout: Layout) -> None:
    """Leave nothing of a conversion that will not go on."""
    for output in layout.outputs:
        part(output.path).unlink(missing_ok=True)
