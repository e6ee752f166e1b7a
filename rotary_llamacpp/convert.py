# SPDX-License-Identifier: MIT
"""What ``rotary convert`` does, in order: read headers, plan, check, prepare, copy, verify, name.

Says what it does by a callback and draws nothing. Whatever fails leaves no file of its own behind; an
interruption leaves what is done under temporary names, and the same call goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import copying, profiles
from . import journal as journals
from .errors import RotaryError
from .gguf_fields import array_strings, encode, raw_fields
from .gguf_header import GGUFHeader
from .gguf_layout import PAGE, Layout, lay_out
from .info import read_shards

PROFILE_KEY = "rotary.profile"  # array of bytes: the archive that profiles.py writes
HISTORY_KEY = "rotary.convert.history"  # array of strings: one line a conversion, the oldest first
_LONGEST_HISTORY = 32
_MIB = 1 << 20

Say = Callable[[str], object]
Bar = Callable[[str, int], AbstractContextManager[copying.Progress]]  # of what, how many bytes


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes
    ----------
    alignment : int
        Of every tensor, in bytes.
    split_bytes : int or None
        Most bytes of a file; None is one file.
    profile : str
        ``"auto"`` stores the one beside the source, or what the source has stored; a path; ``"off"`` none.
    verify : bool
        Compare every tensor with its source when all is written.
    force : bool
        Replace files that are there.
    """

    alignment: int = PAGE
    split_bytes: int | None = None
    profile: str = "auto"
    verify: bool = False
    force: bool = False


@contextlib.contextmanager
def _no_bar(_what: str, _n_bytes: int) -> Iterator[copying.Progress]:
    yield lambda _: None


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    dry_run: bool = False,
    say: Say = lambda _: None,
    bar: Bar = _no_bar,
) -> list[Path]:
    """Convert a model for paging.

    Parameters
    ----------
    source : path-like
        A GGUF file, or the first of its shards.
    out : path-like
        File to write; with `Options.split_bytes` its name without ``.gguf`` begins that of the shards.
    dry_run : bool
        Only say what would be done.
    say, bar : callable
        Are called with lines of text; with what is being done and its bytes.

    Returns
    -------
    list of Path
        The files, the one to load first; those planned with `dry_run`.

    Raises
    ------
    ModelError
        The source is damaged.
    RotaryError
        It cannot be written, or not so.
    """
    options = options or Options()
    source, out = Path(source), Path(out)
    try:
        return _convert(source, out, options, dry_run, say, bar)
    except OSError as error:
        where = error.filename or out
        what = f"{error.strerror or error}"
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check it"
        raise RotaryError(
            f"{where}: {what}, nothing is left of the conversion; {advice}, and convert again"
        ) from error


def _convert(source: Path, out: Path, options: Options, dry_run: bool, say: Say, bar: Bar) -> list[Path]:
    headers = read_shards(source)
    layout = _planned(headers, source, out, options)
    say(layout.describe())
    paths = [output.path for output in layout.outputs]
    if dry_run:
        return paths
    _check_places(headers, layout, options)
    subject = {
        "sources": [journals.identity(header.path) for header in headers],
        "options": {key: value for key, value in asdict(options).items() if key not in ("verify", "force")},
        "version": _version(),
    }
    journal = journals.Journal(out, subject)
    keep = False
    try:
        _write(headers, layout, journal, options, say, bar)
    except KeyboardInterrupt:
        keep = journal.done != [0, 0]
        if keep:
            say(_resumable(layout, journal))
        raise
    finally:
        if not keep:
            journals.remove_parts(layout)
        journal.close(remove=not keep)
    return paths


def _planned(headers: list[GGUFHeader], source: Path, out: Path, options: Options) -> Layout:
    changes: dict[str, bytes | None] = {HISTORY_KEY: _history(headers, options)}
    chosen = profiles.beside(source) if options.profile == "auto" else Path(options.profile)
    if options.profile == "off":
        changes[PROFILE_KEY] = None
    elif options.profile != "auto" or chosen.is_file():
        profiles.load(chosen)  # so that nothing else is stored
        changes[PROFILE_KEY] = encode(PROFILE_KEY, chosen.read_bytes())
    return lay_out(
        headers, out, alignment=options.alignment, split_bytes=options.split_bytes, changes=changes
    )


def _history(headers: list[GGUFHeader], options: Options) -> bytes:
    raw = raw_fields(headers[0]).get(HISTORY_KEY)
    before = array_strings(raw, HISTORY_KEY) if raw else []
    n_bytes = sum(header.n_bytes for header in headers)
    line = (
        f"rotary-llamacpp {_version()}: {headers[0].path.name}, {n_bytes} bytes in {len(headers)} "
        f"file{'s' * (len(headers) > 1)}; alignment {options.alignment}"
    )
    return encode(HISTORY_KEY, [*before, line][-_LONGEST_HISTORY:])


def _version() -> str:
    try:
        return version("rotary-llamacpp")
    except PackageNotFoundError:
        return "unknown"


def _check_places(headers: list[GGUFHeader], layout: Layout, options: Options) -> None:
    inputs = {header.path.resolve() for header in headers}
    for output in layout.outputs:
        if output.path.resolve() in inputs:
            raise RotaryError(
                f"{output.path}: is read and written; a model is not converted in place; give another name"
            )
        if output.path.exists() and not options.force:
            raise RotaryError(f"{output.path}: is there already; --force replaces it; or give another name")
    folder = layout.outputs[0].path.parent
    if not folder.is_dir():
        raise RotaryError(f"{folder}: no such folder; the result goes there; make it, or give another")
    wanted, free = journals.missing_bytes(layout), shutil.disk_usage(folder).free
    if wanted > free:
        raise RotaryError(
            f"{folder}: {wanted / _MIB:.0f} MiB wanted, {free / _MIB:.0f} MiB free; "
            "the source stays beside the result; free some space, or write to another disk"
        )


def _write(
    headers: list[GGUFHeader], layout: Layout, journal: journals.Journal, options: Options, say: Say, bar: Bar
) -> None:
    sources = [header.path for header in headers]
    if journal.stale:
        say("another conversion was begun here; this one begins anew")
    journal.begin(layout)
    if journal.done != [0, 0]:
        done = sum(output.n_bytes for output in layout.outputs[: journal.done[0]]) + journal.done[1]
        say(f"going on after {done / _MIB:.1f} MiB that are done")
    with bar("copy", layout.n_bytes) as progress:
        copying.copy(layout, sources, journal, progress)
    copying.check_headers(layout)
    if options.verify:
        with bar("verify", sum(weight.n_bytes for weight, _ in layout.weights)) as progress:
            copying.verify(layout, sources, progress)
        say(f"verified: {len(layout.weights)} tensors are equal to their sources")
    copying.give_names(layout)


def _resumable(layout: Layout, journal: journals.Journal) -> str:
    done = sum(output.n_bytes for output in layout.outputs[: journal.done[0]]) + journal.done[1]
    parts = layout.outputs[0].path.parent / f"{layout.outputs[0].path.stem}*.part*"
    return (
        f"interrupted after {done / _MIB:.1f} of {layout.n_bytes / _MIB:.1f} MiB; the same command goes on "
        f"from there; {parts} can be removed otherwise"
    )
