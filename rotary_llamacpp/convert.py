# SPDX-License-Identifier: MIT
"""What ``rotary convert`` does, in order: read headers, plan, check, prepare, copy, verify, name.

Says what it does by a callback and draws nothing. Whatever fails leaves no file of its own behind; an
interruption leaves what is done under temporary names, and the same call goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gguf.constants import GGML_QUANT_VERSION

from . import copying, folders, profiles, quantising
from . import journal as journals
from .errors import RotaryError
from .gguf_fields import array_strings, encode, raw_fields
from .gguf_header import GGUFHeader, read_header
from .gguf_layout import PAGE, Layout, lay_out
from .info import read_shards
from .quantising import Wish

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
    wish : Wish
        Other types of tensors, by llama.cpp's quantiser; nothing is quantised without.
    verify : bool
        Compare every tensor with its source when all is written.
    force : bool
        Replace files that are there.
    """

    alignment: int = PAGE
    split_bytes: int | None = None
    profile: str = "auto"
    wish: Wish = field(default_factory=Wish)
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
        A GGUF file, or the first of its shards, or a Hugging Face folder of safetensors.
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
    if not source.is_dir():
        return _convert_files(read_shards(source), source, out, options, dry_run, say, bar)
    files = folders.weights_of(source)
    folders.converter()
    n_bytes = sum(file.stat().st_size for file in files)
    say(f"{source}: {n_bytes / _MIB:.1f} MiB of safetensors; llama.cpp's converter makes a GGUF of it first")
    if dry_run:
        say("what is in that is known then")
        return [out]
    _check_folder(out.parent, n_bytes)
    made = journals.part(out.with_name(out.name + ".folder"))
    noted = journals.part(out.with_name(out.name + ".folder.json"))  # is there once the other is whole
    subject = json.dumps([journals.identity(file) for file in files])
    keep = False
    try:
        if made.is_file() and noted.is_file() and noted.read_text() == subject:
            say("going on with the GGUF that was made of it")
        else:
            noted.unlink(missing_ok=True)
            with bar("read safetensors", n_bytes):
                folders.to_gguf(source, made)
            noted.write_text(subject)
        return _convert_files(read_shards(made), source, out, options, dry_run, say, bar)
    except KeyboardInterrupt:
        keep = noted.is_file()
        raise
    finally:
        if not keep:
            made.unlink(missing_ok=True)
            noted.unlink(missing_ok=True)


def _convert_files(
    headers: list[GGUFHeader], source: Path, out: Path, options: Options, dry_run: bool, say: Say, bar: Bar
) -> list[Path]:
    work = _Work(source, out, options, headers, say, bar)
    say(work.describe())
    paths = [output.path for output in work.layout.outputs]
    if not dry_run:
        _check_places(headers, work, options)
        work.do()
    return paths


class _Work:
    """One conversion: its plan from headers, and what is done in what order."""

    def __init__(
        self, source: Path, out: Path, options: Options, headers: list[GGUFHeader], say: Say, bar: Bar
    ) -> None:
        self.source, self.out, self.options, self.headers, self.say, self.bar = (
            source, out, options, headers, say, bar,
        )  # fmt: skip
        self.quantised = journals.part(out.with_name(out.name + ".quantised"))
        self.planned = quantising.planned(options.wish, headers) if options.wish else None
        self.layout = self._lay_out([self.planned] if self.planned else headers)

    def describe(self) -> str:
        """The plan as text."""
        lines = [self.layout.describe()]
        if self.planned:
            mib = sum(tensor.n_bytes for tensor in self.planned.tensors) / _MIB
            lines.append(f"quantise        {self.options.wish}; {mib:.1f} MiB more are taken meanwhile")
            lines += quantising.changes(self.headers, self.planned)
        return "\n".join(lines)

    def missing_bytes(self) -> int:
        """Disk space that is still to be taken."""
        wanted = journals.missing_bytes(self.layout)
        if self.planned:
            wanted += max(0, self.planned.n_bytes - journals.size(self.quantised))
        return wanted

    def do(self) -> None:
        """All of it; what is left behind is told where it goes on."""
        subject = {
            "sources": [journals.identity(header.path) for header in self.headers],
            "options": {k: v for k, v in asdict(self.options).items() if k not in ("verify", "force")},
            "imatrix": journals.identity(Path(imatrix)) if (imatrix := self.options.wish.imatrix) else None,
            "version": _version(),
        }
        journal = journals.Journal(self.out, subject)
        keep = False
        try:
            if journal.stale:
                self.say("another conversion was begun here; this one begins anew")
            self._write(journal)
        except KeyboardInterrupt:
            keep = bool(journal.done != [0, 0] or journal.stages)
            self.say(self._interrupted(journal) if keep else "interrupted; nothing is left")
            raise
        finally:
            if not keep:
                journals.remove_parts(self.layout)
                self.quantised.unlink(missing_ok=True)
            journal.close(remove=not keep)

    def _write(self, journal: journals.Journal) -> None:
        headers = self.headers
        if self.planned:
            headers = [self._quantise(journal)]
        layout = self.layout = self._lay_out(headers)
        sources = [header.path for header in headers]
        journal.begin(layout)
        if journal.done != [0, 0]:
            self.say(f"going on after {self._done_bytes(journal) / _MIB:.1f} MiB that are done")
        with self.bar("copy", layout.n_bytes) as progress:
            copying.copy(layout, sources, journal, progress)
        copying.check_headers(layout)
        if self.options.verify:
            with self.bar("verify", sum(weight.n_bytes for weight, _ in layout.weights)) as progress:
                copying.verify(layout, sources, progress)
            self.say(f"verified: {len(layout.weights)} tensors are equal to their sources")
        copying.give_names(layout)

    def _quantise(self, journal: journals.Journal) -> GGUFHeader:
        if self.quantised.exists() and journal.stages.get("quantised") == journals.identity(self.quantised):
            self.say("going on with what is quantised")
            return read_header(self.quantised)
        self.quantised.unlink(missing_ok=True)
        with self.bar("quantise", sum(header.n_bytes for header in self.headers)) as progress:
            quantising.quantise(self.options.wish, self.headers, self.quantised, progress)
        journal.stages["quantised"] = journals.identity(self.quantised)
        journal.write()
        return read_header(self.quantised)

    def _lay_out(self, headers: list[GGUFHeader]) -> Layout:
        changes: dict[str, bytes | None] = {HISTORY_KEY: _history(self.headers, self.source, self.options)}
        changes[profiles.KEY] = _profile(self.source, self.options)
        if not changes[profiles.KEY] and self.options.profile == "auto":
            del changes[profiles.KEY]  # what the source has stays
        if self.options.wish:
            if (number := quantising.announced(self.options.wish)) is not None:
                changes["general.file_type"] = encode("general.file_type", number)
            changes["general.quantization_version"] = encode(
                "general.quantization_version", GGML_QUANT_VERSION
            )
        return lay_out(
            headers, self.out, alignment=self.options.alignment, split_bytes=self.options.split_bytes,
            changes=changes, described_by=self.headers,
        )  # fmt: skip

    def _done_bytes(self, journal: journals.Journal) -> int:
        file, n_bytes = journal.done
        return sum(output.n_bytes for output in self.layout.outputs[:file]) + n_bytes

    def _interrupted(self, journal: journals.Journal) -> str:
        done, total = self._done_bytes(journal) / _MIB, self.layout.n_bytes / _MIB
        parts = self.out.with_name(f"{self.out.name.removesuffix('.gguf')}*.part*")
        return (
            f"interrupted after {done:.1f} of {total:.1f} MiB; the same command goes on from there; "
            f"{parts} can be removed otherwise"
        )


def _profile(source: Path, options: Options) -> bytes | None:
    """The profile to store, encoded; None for none."""
    if options.profile == "off":
        return None
    path = profiles.beside(source) if options.profile == "auto" else Path(options.profile)
    if options.profile == "auto" and not path.is_file():
        return None
    profiles.load(path)  # so that nothing else is stored
    return encode(profiles.KEY, path.read_bytes())


def _history(headers: list[GGUFHeader], source: Path, options: Options) -> bytes:
    raw = raw_fields(headers[0], [HISTORY_KEY]).get(HISTORY_KEY)
    before = array_strings(raw, HISTORY_KEY) if raw else []
    n_bytes = sum(header.n_bytes for header in headers)
    line = (
        f"rotary-llamacpp {_version()}: {source.name}, {n_bytes} bytes in {len(headers)} "
        f"file{'s' * (len(headers) > 1)}; alignment {options.alignment}"
        + (f"; {options.wish}" if options.wish else "")
    )
    return encode(HISTORY_KEY, [*before, line][-_LONGEST_HISTORY:])


def _version() -> str:
    try:
        return version("rotary-llamacpp")
    except PackageNotFoundError:
        return "unknown"


def _check_places(headers: list[GGUFHeader], work: _Work, options: Options) -> None:
    inputs = {header.path.resolve() for header in headers}
    for output in work.layout.outputs:
        if output.path.resolve() in inputs:
            raise RotaryError(
                f"{output.path}: is read and written; a model is not converted in place; give another name"
            )
        if output.path.exists() and not options.force:
            raise RotaryError(f"{output.path}: is there already; --force replaces it; or give another name")
    _check_folder(work.out.parent, work.missing_bytes())


def _check_folder(folder: Path, wanted: int) -> None:
    if not folder.is_dir():
        raise RotaryError(f"{folder}: no such folder; the result goes there; make it, or give another")
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise RotaryError(
            f"{folder}: {wanted / _MIB:.0f} MiB wanted, {free / _MIB:.0f} MiB free; "
            "the source stays beside the result; free some space, or write to another disk"
        )
