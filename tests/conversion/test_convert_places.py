# SPDX-License-Identifier: MIT
"""Where conversions write: they leave files of others alone, and the result gets all its names or none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rotary_llamacpp.conversion import quantising
from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.conversion.journal import Journal, note_path
from rotary_llamacpp.conversion.quantising import Wish
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.gguf_files.info import read_shards
from tests.support.conversions import MIB, assert_nothing_else, at_call, tensor_bytes
from tests.support.routings import numbered

SPLIT = Options(split_bytes=12 * MIB)  # two files


# ---- before anything is written ----------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", ["out.gguf.part", "out.gguf.part.json", "out.gguf.quantised.part"])
def test_somebody_elses_temporary_files_are_left(tiny_model, tmp_path, name, link):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    if link:
        (tmp_path / name).symlink_to(theirs)
    else:
        (tmp_path / name).write_text("theirs")
    wish = Wish("Q4_0") if "quantised" in name else Wish()
    with pytest.raises(RotaryError, match=r"exists, and no|exists and is not|symbolic links"):
        convert(tiny_model, tmp_path / "out.gguf", Options(wish=wish))
    assert (tmp_path / name).read_text() == theirs.read_text() == "theirs"
    assert_nothing_else(tmp_path, tmp_path / name, theirs)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("out", "text"),
    [
        (".", "is a folder"),
        ("", "is a folder"),
        ("folder", "is a folder"),
        ("none/out.gguf", "no such folder"),
        ("model.gguf.part", "cannot be converted in place"),
        ("model.gguf", "cannot be converted in place"),  # by its temporary name
        ("a.profile", "cannot be converted in place"),
        ("dangling", "exists; give --force"),
        ("loop", "exists; give --force"),
    ],
)
def test_places_that_are_refused(tiny_model, tmp_path, monkeypatch, out, text, dry_run):
    monkeypatch.chdir(tmp_path)
    source = Path("model.gguf.part")
    source.write_bytes(tiny_model.read_bytes())
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    numbered().save(Path("a.profile"))
    before = sorted(tmp_path.iterdir())
    options = Options(force="--force" not in text, profile="a.profile")
    with pytest.raises(RotaryError, match=text):
        convert(source, out, options, dry_run=dry_run)
    assert source.read_bytes() == tiny_model.read_bytes()
    assert sorted(tmp_path.iterdir()) == before


# ---- the journal -------------------------------------------------------------------------------------


def test_one_conversion_at_a_time(tmp_path, monkeypatch):
    out, real = tmp_path / "out.gguf", fcntl.flock
    held = Journal(out, {})
    with pytest.raises(RotaryError, match="being converted by another process"):
        Journal(out, {})
    held.close(remove=True)

    def late(fd: int, how: int) -> None:
        """Between opening and locking, the previous holder finishes."""
        monkeypatch.setattr(fcntl, "flock", real)
        note_path(out).unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    held = Journal(out, {})
    with pytest.raises(RotaryError, match="being converted by another process"):
        Journal(out, {})
    held.close(remove=True)
    assert_nothing_else(tmp_path)


def test_a_file_system_without_locks(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", at_call(1, fcntl.flock, OSError(errno.ENOSYS, "not implemented")))
    assert_nothing_else(tmp_path, *convert(tiny_model, tmp_path / "out.gguf"))


@pytest.mark.usefixtures("small_steps")
def test_a_journal_means_files_beside_it(tiny_model, tmp_path, monkeypatch):
    """A conversion is begun in one folder and resumed from another that has files of the same names."""
    real = os.copy_file_range
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setattr(os, "copy_file_range", at_call(60, real, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, "out.gguf", SPLIT)
    monkeypatch.setattr(os, "copy_file_range", real)
    monkeypatch.chdir(tmp_path / "b")
    theirs = [Path(f"out-0000{i}-of-00002.gguf.part") for i in (1, 2)]
    for path in theirs:
        path.write_text("theirs")
    said: list[str] = []
    paths = convert(tiny_model, tmp_path / "a" / "out.gguf", SPLIT, say=said.append)
    assert any(line.startswith("resuming after") for line in said)
    assert_nothing_else(tmp_path / "a", *paths)
    assert [path.read_text() for path in theirs] == ["theirs"] * 2


@pytest.mark.usefixtures("small_steps")
def test_what_another_conversion_left_goes_at_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", at_call(60, os.copy_file_range, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "out.gguf", SPLIT)
    monkeypatch.setattr(quantising, "quantise", at_call(1, quantising.quantise, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "out.gguf", Options(wish=Wish("Q4_0")))
    assert_nothing_else(tmp_path)


# ---- names at the end --------------------------------------------------------------------------------


@pytest.fixture
def another_thread() -> Iterator[None]:
    """Run a thread that receives the signals that the main thread blocks."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_signal_comes_between_two_names(tiny_model, tmp_path, monkeypatch, how):
    real, before = os.replace, signal.signal(how, signal.default_int_handler)

    def replace(*paths: Any) -> None:
        real(*paths)
        os.kill(os.getpid(), how)

    monkeypatch.setattr(os, "replace", replace)
    try:
        paths = convert(tiny_model, tmp_path / "out.gguf", SPLIT)
        assert signal.getsignal(how) is signal.default_int_handler
    finally:
        signal.signal(how, before)
    assert_nothing_else(tmp_path, *paths)
    assert tensor_bytes(read_shards(paths[0])) == tensor_bytes([read_header(tiny_model)])


def test_what_cannot_be_replaced_is_left(tiny_model, tmp_path, monkeypatch):
    paths = convert(tiny_model, tmp_path / "out.gguf", SPLIT)
    for path in paths:
        path.write_text("old")
    monkeypatch.setattr(os, "replace", at_call(2, os.replace, OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RotaryError, match="Input/output error; 1 of 2 files were, so the old model is lost"):
        convert(tiny_model, tmp_path / "out.gguf", Options(split_bytes=12 * MIB, force=True))
    assert paths[0].read_text() == "old" and len(read_header(paths[1]).tensors) > 0
    assert_nothing_else(tmp_path, *paths)


def test_a_file_made_meanwhile_is_left(tiny_model, tmp_path, monkeypatch):
    out, real = tmp_path / "out.gguf", os.copy_file_range

    def meddle(*args: Any) -> int:
        out.write_text("theirs")
        return real(*args)

    monkeypatch.setattr(os, "copy_file_range", meddle)
    with pytest.raises(RotaryError, match="appeared during the conversion; give --force"):
        convert(tiny_model, out)
    assert out.read_text() == "theirs"
    assert_nothing_else(tmp_path, out)
    assert convert(tiny_model, out, Options(force=True)) == [out]


def test_what_does_not_matter_fails_nothing(tiny_model, tmp_path, monkeypatch):
    """The folder cannot be synced, output is a broken pipe, and few files may be open."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    def say(_: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(os, "fsync", fsync)
    n_open = len(os.listdir("/proc/self/fd"))
    with few_files(n_open + 10):
        paths = convert(tiny_model, tmp_path / "out.gguf", Options(split_bytes=MIB, verify=True), say=say)
    assert len(paths) > 15
    assert_nothing_else(tmp_path, *paths)


@contextlib.contextmanager
def few_files(number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
