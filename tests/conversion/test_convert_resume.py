# SPDX-License-Identifier: MIT
"""Conversions that are interrupted at various moments and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rotary_llamacpp.conversion import copying, quantising
from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.conversion.journal import Journal, note_path, part
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.gguf_files.info import read_shards
from tests.support import HANG_S, ROOT, heed_hang_ups, no_hang
from tests.support.conversions import MIB, assert_nothing_else, at_call, tensor_bytes


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("options", [Options(), Options(split_bytes=8 * MIB)])
@pytest.mark.parametrize("number", [1, 3, 60, 70])
def test_an_interrupted_copy_goes_on(tiny_model, tmp_path, monkeypatch, options, number):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = [path.read_bytes() for path in convert(tiny_model, whole / "out.gguf", options)]
    folder = tmp_path / "interrupted"
    folder.mkdir()
    said: list[str] = []
    copied: list[int] = []
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", at_call(number, real, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, folder / "out.gguf", options, say=said.append)
    assert not [path for path in folder.iterdir() if ".part" not in path.name], "nothing has its final name"
    resumable = "the same command resumes" in said[-1]
    assert resumable or (number == 1 and said[-1] == "interrupted; no files are left")
    assert bool(list(folder.iterdir())) == resumable

    def counted(*args: Any) -> int:
        copied.append(real(*args))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", counted)
    paths = convert(tiny_model, folder / "out.gguf", options, say=said.append)
    assert [path.read_bytes() for path in paths] == expected
    assert_nothing_else(folder, *paths)
    total = sum(tensor.n_bytes for tensor in read_header(tiny_model).tensors)
    if number >= 60:
        assert "resuming after" in "\n".join(said) and 0 < sum(copied) < total - 3 * MIB


@pytest.mark.parametrize(
    ("where", "name", "number"), [(copying, "_read_into", 9), (os, "replace", 1), (os, "replace", 2)]
)
def test_an_interrupted_end_goes_on(tiny_model, tmp_path, monkeypatch, where, name, number):
    options = Options(split_bytes=12 * MIB, verify=True)
    real = getattr(where, name)
    monkeypatch.setattr(where, name, at_call(number, real, KeyboardInterrupt()))
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "out.gguf", options, say=said.append)
    assert "the same command resumes" in said[-1]
    assert all(".part" in path.name for path in tmp_path.iterdir()), "nothing has its final name"
    monkeypatch.setattr(where, name, real)
    if name == "_read_into":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: pytest.fail("it was copied again"))
    paths = convert(tiny_model, tmp_path / "out.gguf", options, say=said.append)
    assert said[-1].startswith("verified")
    assert_nothing_else(tmp_path, *paths)
    assert tensor_bytes(read_shards(paths[0])) == tensor_bytes([read_header(tiny_model)])


@pytest.mark.usefixtures("small_steps")
def test_another_conversion_begins_anew(tiny_model, tmp_path, monkeypatch):
    out, split = tmp_path / "out.gguf", Options(split_bytes=8 * MIB)
    real = os.copy_file_range
    for options in (Options(), split):
        monkeypatch.setattr(os, "copy_file_range", at_call(60, real, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(tiny_model, out, options)
    monkeypatch.setattr(os, "copy_file_range", real)
    said: list[str] = []
    paths = convert(tiny_model, out, Options(alignment=512), say=said.append)
    assert "another conversion was interrupted here; this one starts over" in said
    assert_nothing_else(tmp_path, *paths)
    assert tensor_bytes(read_shards(paths[0])) == tensor_bytes([read_header(tiny_model)])


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("spoil", ["journal", "part", "shorter part"])
def test_what_is_left_is_not_trusted_blindly(tiny_model, tmp_path, monkeypatch, spoil):
    out, real = tmp_path / "out.gguf", os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", at_call(60, real, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, out)
    monkeypatch.setattr(os, "copy_file_range", real)
    if spoil == "journal":
        note_path(out).write_text(note_path(out).read_text()[:-9])
    elif spoil == "part":
        part(out).unlink()
    else:
        os.truncate(part(out), 5 * MIB)
    convert(tiny_model, out)
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
    assert_nothing_else(tmp_path, out)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [1]}, {"files": "x.part"}, {"files": None}, {"stages": [[1, 2]]}, {"stages": 1},
        {"layout": 7},
        {"done": ["x", 0]}, {"done": [0, 2**70]}, {"done": [-1, 0]}, {"done": [0.5, 1]}, {"done": 3},
        {"done": [2**63, 1]},
    ],
)  # fmt: skip
def test_a_journal_of_other_values(tmp_path, changes):
    # As with a truncated journal, nothing is taken from it, but it is recognised as a journal.
    out = tmp_path / "out.gguf"
    journal = Journal(out, {"a": 1})
    journal.note(0, 4096)
    journal.close(remove=False)
    found = json.loads(note_path(out).read_text())
    note_path(out).write_text(json.dumps(found | changes))
    again = Journal(out, {"a": 1})
    assert again.stale and not again.resumable
    again.claim([part(out)])
    again.close(remove=True)
    note_path(out).write_text('{"subject": ' + "[" * 100000)
    Journal(out, {"a": 1}).close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantised_is_kept_when_the_copy_is_interrupted(tiny_model, tmp_path, monkeypatch):
    out, options = tmp_path / "out.gguf", Options(wish=quantising.Wish("Q4_0"))
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", at_call(30, real, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, out, options)
    monkeypatch.setattr(os, "copy_file_range", real)
    monkeypatch.setattr(quantising, "quantise", lambda *_: pytest.fail("it was quantised again"))
    said: list[str] = []
    convert(tiny_model, out, options, say=said.append)
    assert "reusing out.gguf.quantised.part, which is complete" in said
    assert_nothing_else(tmp_path, out)


# Copies until the journal notes more progress than at the start, prints "noted", and then stops copying.
UNTIL_NOTED = """
import os, sys, threading, time
from rotary_llamacpp import cli
from rotary_llamacpp.conversion import copying, journal
copying.CHUNK_BYTES, copying._NOTE_BYTES = 1 << 16, 1 << 20
copy, note, noted, n_copied = os.copy_file_range, journal.Journal.note, threading.Event(), 0
def noting(*args):
    note(*args)
    noted.set()
def copying_some(*args):
    global n_copied
    if n_copied > 2 << 20:
        noted.wait()
        print("noted", flush=True)
        time.sleep(3600)
    n_copied += (n_bytes := copy(*args))
    return n_bytes
os.copy_file_range, journal.Journal.note = copying_some, noting
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals(tiny_model, tmp_path, how):
    """A real signal to a real process, at several moments."""
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", UNTIL_NOTED, "convert", tiny_model, out]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        before = _noted(out)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=env, text=True, preexec_fn=heed_hang_ups, **streams)
        try:
            with no_hang():
                said = process.stdout.readline()
                process.send_signal(how)
                said += process.communicate()[1]
        finally:
            process.kill()
        assert said.startswith("noted\n") and _noted(out) > before and not out.exists(), said
        if how == signal.SIGINT:
            assert (
                process.returncode == 130 and "the same command resumes" in said and "Traceback" not in said
            )
        else:
            assert process.returncode == -how
    ran = subprocess.run(
        [sys.executable, "-m", "rotary_llamacpp", "convert", tiny_model, out, "--verify"],
        env=env, capture_output=True, text=True, timeout=HANG_S, check=True,
    )  # fmt: skip
    going_on = re.search(r"resuming after ([\d.]+) MiB", ran.stderr)
    assert going_on and float(going_on[1]) > 3
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
    assert_nothing_else(tmp_path, out)


def _noted(out: Path) -> int:
    """Bytes that the journal notes as durable; 0 without a readable journal."""
    try:
        return json.loads(note_path(out).read_text())["done"][1]
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_ctrl_c_ends_the_quantiser(synthetic, tmp_path, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    model = synthetic(type="f16", layers=4, experts=16, embd=256, ff=512)
    target = part(tmp_path / "out.gguf.quantised")
    over = threading.Event()

    def interrupt() -> None:
        while not target.exists() and not over.wait(0.001):
            pass
        started[-1].send_signal(signal.SIGSTOP)  # else it might finish meanwhile
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with no_hang(), pytest.raises(KeyboardInterrupt):
        try:
            convert(model, tmp_path / "out.gguf", Options(wish=quantising.Wish("IQ4_XS", "Q6_K")))
        finally:
            over.set()
    thread.join()
    assert [process.returncode for process in started][1:] == [-signal.SIGKILL]
    assert_nothing_else(tmp_path)
