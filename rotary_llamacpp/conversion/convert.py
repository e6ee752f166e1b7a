# SPDX-License-Identifier: MIT
"""Converts models for ``rotary convert``: reads headers, plans, checks, prepares, copies, verifies and names.

Reports through callbacks and draws nothing. A failure leaves no files behind; an interruption leaves finished
work under temporary names, and the same call resumes from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gguf.constants import GGML_QUANT_VERSION

from ..errors import ModelError, RotaryError
from ..gguf_files.fields import array_strings, encode, raw_fields
from ..gguf_files.header import GGUFHeader, read_header
from ..gguf_files.info import read_shards
from ..gguf_files.layout import PAGE, Layout, check_alignment, lay_out
from ..traces import profiles
from ..units import mib
from . import copying, folders, quantising
from . import journal as journals
from .quantising import Wish

HISTORY_KEY = "rotary.convert.history"  # array of strings, one for each conversion, oldest first
_MAX_HISTORY = 32

Say = Callable[[str], object]
Bar = Callable[[str, int], AbstractContextManager[copying.Progress]]  # takes a title and a number of bytes


@dataclass(frozen=True)
class Options:
    """Options of a conversion.

    Attributes
    ----------
    alignment : int
        Alignment of every tensor, in bytes.
    split_bytes : int or None
        Maximum bytes of a file; None makes one file.
    profile : str
        Profile to store: ``"auto"`` is the one beside the source or in it; or a path; ``"off"`` is none.
    wish : Wish
        Types to quantise tensors to with llama.cpp's quantiser; by default nothing is quantised.
    verify : bool
        Compare every tensor with the source at the end.
    force : bool
        Replace existing files.
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
        File to write; with `Options.split_bytes`, shards are named after it.
    dry_run : bool
        Only report what would be done.
    say, bar : callable
        `say` gets lines of text; `bar` gets the title and the number of bytes of each step.

    Returns
    -------
    list of Path
        Files of the result, or of the plan with `dry_run`; the file to load comes first.

    Raises
    ------
    ModelError
        The source is damaged.
    RotaryError
        The result cannot be written, or the options are not valid for this model.
    """
    out = Path(out)

    def heard(line: str) -> None:
        with contextlib.suppress(OSError):  # a closed pipe must not fail the conversion
            say(line)

    try:
        return _Work(Path(source), out, options or Options(), heard, bar).run(dry_run)
    except OSError as error:
        where = error.filename or out
        what = f"{error.strerror or error}"
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check it"
        raise RotaryError(
            f"{where}: {what}, the conversion was undone; {advice}, and convert again"
        ) from error


class _Work:
    """One conversion, planned when the object is made."""

    def __init__(self, source: Path, out: Path, options: Options, say: Say, bar: Bar) -> None:
        self.source, self.out, self.options, self.say, self.bar = source, out, options, say, bar
        if not out.name or out.is_dir():
            raise RotaryError(f"{str(out)!r}: is a folder; give the name of a file")
        quantising.patterns(options.wish)
        check_alignment(options.alignment)
        self.profile = _profile(source, options)
        self.made = journals.part(out.with_name(out.name + ".folder"))  # GGUF made of a Hugging Face folder
        self.quantised = journals.part(out.with_name(out.name + ".quantised"))
        self.planned: GGUFHeader | None = None
        self.layout: Layout | None = None  # None until a folder has been read
        self.folder_bytes = 0
        if source.is_dir():
            inputs = folders.files_of(source)
            folders.converter()
            self.folder_bytes = sum(file.stat().st_size for file in inputs if file.suffix == ".safetensors")
            self.description = (
                f"{source}: {mib(self.folder_bytes)} of safetensors; llama.cpp's converter first makes a "
                "GGUF of them, then the plan is printed"
            )
        else:
            self._plan(read_shards(source))
            inputs = [header.path for header in self.headers]
        self.before = {path: journals.identity(path) for path in inputs}

    def _plan(self, headers: list[GGUFHeader]) -> None:
        self.headers = headers
        wish = self.options.wish
        lines: list[str] = []
        if wish:
            self.planned, lines = quantising.planned(wish, headers)
            lines.insert(0, f"quantise        {wish}")
        if self.planned:
            meanwhile = sum(tensor.n_bytes for tensor in self.planned.tensors)
            lines[0] += f"; {mib(meanwhile)} more are needed temporarily"
        self.layout = self._lay_out([self.planned] if self.planned else headers)
        self.description = "\n".join([self.layout.describe(), *lines])

    @property
    def outputs(self) -> list[Path]:
        """Paths of the result; only the first until a folder has been read."""
        return [output.path for output in self.layout.outputs] if self.layout else [self.out]

    def _temporary(self) -> dict[Path, int]:
        """Temporary files that are still to be written, with their bytes."""
        if self.layout is None:
            return {self.made: self.folder_bytes, journals.part(self.out): self.folder_bytes}
        found = {journals.part(output.path): output.n_bytes for output in self.layout.outputs}
        return found | ({self.quantised: self.planned.n_bytes} if self.planned else {})

    def run(self, dry_run: bool) -> list[Path]:
        """Run the conversion; return the paths of the result."""
        self._check_places()
        self.say(self.description)
        if dry_run:
            self._check_space()
            return self.outputs
        subject = {
            "sources": list(self.before.values()),
            "options": {k: v for k, v in asdict(self.options).items() if k not in ("verify", "force")},
            "imatrix": journals.identity(Path(imatrix)) if (imatrix := self.options.wish.imatrix) else None,
            "version": _version(),
        }
        journal = journals.Journal(self.out, subject)
        keep = False
        try:
            if journal.stale:
                self.say("another conversion was interrupted here; this one starts over")
            layout = self._write(journal)
            with copying.undisturbed():
                copying.give_names(layout, force=self.options.force)
                journal.close(remove=True)
        except KeyboardInterrupt:
            keep = journal.resumable
            self.say(self._interrupted(journal) if keep else "interrupted; no files are left")
            raise
        finally:
            journal.close(remove=not keep)
        if self.options.verify:
            read = "the quantised ones" if self.planned else "their sources"
            self.say(f"verified: {len(layout.weights)} tensors are equal to {read}")
        return self.outputs

    def _write(self, journal: journals.Journal) -> Layout:
        """Write all files under temporary names; return their layout."""
        journal.claim(self._temporary())
        if self.layout is None:
            if not journal.has(self.made):
                self._check_space()
            self._stage(
                journal, self.made, "read safetensors", self.folder_bytes,
                lambda progress: folders.to_gguf(self.source, self.made, progress),
            )  # fmt: skip
            self._plan(read_shards(self.made))
            self.say(self.description)
            self._check_places()
            journal.claim(self._temporary())
        self._check_space()
        headers = self.headers
        if self.planned:
            self._stage(
                journal, self.quantised, "quantise", sum(header.n_bytes for header in headers),
                lambda progress: quantising.quantise(self.options.wish, headers, self.quantised, progress),
            )  # fmt: skip
            headers = [read_header(self.quantised)]
        layout = self.layout = self._lay_out(headers)
        sources = [header.path for header in headers]
        journal.begin(layout)
        if journal.done != [0, 0]:
            self.say(f"resuming after {mib(self._done_bytes(journal))} that are done")
        with self.bar("copy", layout.n_bytes) as progress:
            copying.copy(layout, sources, journal, progress)
        self._check_unchanged()
        copying.check_headers(layout)
        if self.options.verify:
            with self.bar("verify", sum(weight.n_bytes for weight, _ in layout.weights)) as progress:
                copying.verify(layout, sources, progress)
        return layout

    def _stage(
        self, journal: journals.Journal, path: Path, what: str, n_bytes: int,
        make: Callable[[copying.Progress], None],
    ) -> None:  # fmt: skip
        """Make a file that the next steps read, unless it is complete already."""
        if journal.has(path):
            self.say(f"reusing {path.name}, which is complete")
        else:
            path.unlink(missing_ok=True)
            with self.bar(what, n_bytes) as progress:
                make(progress)
            self._check_unchanged()
            journal.finish(path)
        self.before[path] = journals.identity(path)

    def _check_unchanged(self) -> None:
        for path, before in self.before.items():
            if journals.identity(path) != before:
                raise ModelError(f"{path}: changed while it was converted; convert it again")

    def _check_places(self) -> None:
        read = {
            os.path.realpath(path) for path in (*self.before, self.options.wish.imatrix, self.profile) if path
        }
        for path in (*self.outputs, *self._temporary(), journals.note_path(self.out)):
            if os.path.realpath(path) in read:
                raise RotaryError(f"{path}: a model cannot be converted in place; give another name")
        for path in self.outputs:
            if path.is_dir():
                raise RotaryError(f"{path}: is a folder; give another name")
            if os.path.lexists(path) and not self.options.force:
                raise RotaryError(f"{path}: exists; give --force to replace it, or another name")
        if not self.out.parent.is_dir():
            raise RotaryError(f"{self.out.parent}: no such folder; make it, or give another")

    def _check_space(self) -> None:
        folder = self.out.parent
        wanted = sum(max(0, n_bytes - journals.size(path)) for path, n_bytes in self._temporary().items())
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise RotaryError(
                f"{folder}: {mib(wanted, 0)} needed, {mib(free, 0)} free; "
                "free some space, or write to another disk"
            )

    def _lay_out(self, headers: list[GGUFHeader]) -> Layout:
        wish = self.options.wish if self.planned else Wish()
        changes: dict[str, bytes | None] = {HISTORY_KEY: self._history(wish)}
        if self.profile or self.options.profile == "off":  # otherwise the profile in the source stays
            changes[profiles.KEY] = encode(profiles.KEY, self.profile.read_bytes()) if self.profile else None
        if wish:
            if (number := quantising.announced(wish)) is not None:
                changes["general.file_type"] = encode("general.file_type", number)
            changes["general.quantization_version"] = encode(
                "general.quantization_version", GGML_QUANT_VERSION
            )
        return lay_out(
            headers, self.out, alignment=self.options.alignment, split_bytes=self.options.split_bytes,
            changes=changes, described_by=self.headers,
        )  # fmt: skip

    def _history(self, wish: Wish) -> bytes:
        raw = raw_fields(self.headers[0], [HISTORY_KEY]).get(HISTORY_KEY)
        before = array_strings(raw, HISTORY_KEY) if raw else []
        n_bytes = sum(header.n_bytes for header in self.headers)
        line = (
            f"rotary-llamacpp {_version()}: {self.source.name}, {n_bytes} bytes in {len(self.headers)} "
            f"file{'s' * (len(self.headers) > 1)}; alignment {self.options.alignment}"
            + (f"; {wish}" if wish else "")
        )
        return encode(HISTORY_KEY, [*before, line][-_MAX_HISTORY:])

    def _done_bytes(self, journal: journals.Journal) -> int:
        file, n_bytes = journal.done
        return sum(output.n_bytes for output in self.layout.outputs[:file]) + n_bytes if self.layout else 0

    def _interrupted(self, journal: journals.Journal) -> str:
        total = mib(self.layout.n_bytes if self.layout else 0)
        parts = self.out.with_name(f"{self.out.name.removesuffix('.gguf')}*.part*")
        return (
            f"interrupted after {mib(self._done_bytes(journal))} of {total}; the same command resumes "
            f"there; otherwise {parts} can be removed"
        )


def _profile(source: Path, options: Options) -> Path | None:
    """Path of the profile to store; None if there is none."""
    if options.profile == "off":
        return None
    path = profiles.beside(source) if options.profile == "auto" else Path(options.profile)
    if options.profile == "auto" and not path.is_file():
        return None
    profiles.load(path)  # refuses anything that is not a profile
    return path


def _version() -> str:
    try:
        return version("rotary-llamacpp")
    except PackageNotFoundError:
        return "unknown"
