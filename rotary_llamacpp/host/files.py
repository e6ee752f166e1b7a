# SPDX-License-Identifier: MIT
"""Reads only regular files, and writes files that get their names once they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import RotaryError


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a folder, a pipe or a device; reading one might never end.

    Raises
    ------
    OSError
        The path is not a regular file, or does not exist.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check early that a file can be written; one that exists stays as it is.

    Raises
    ------
    RotaryError
        The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> RotaryError:
    return RotaryError(f"{path}: cannot be written, {error.strerror}; choose another place")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing, which gets its name once the block has ended.

    Raises
    ------
    RotaryError
        The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _not_written(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
