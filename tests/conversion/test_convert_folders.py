# SPDX-License-Identifier: MIT
"""Hugging Face folders, with a stand-in for llama.cpp's converter; test_hugging_face.py runs the real one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rotary_llamacpp.conversion import folders
from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.conversion.quantising import Wish
from rotary_llamacpp.errors import ModelError, RotaryError
from rotary_llamacpp.gguf_files.header import read_header
from tests.support import ROOT, heed_hang_ups, no_hang
from tests.support.conversions import MIB, assert_nothing_else, at_call, tensor_bytes


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An empty folder."""
    made = tmp_path / "results"
    made.mkdir()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The part of a Hugging Face folder that is read before the converter runs."""
    made = tmp_path / "folder"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(100))
    return made


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Install a llama.cpp source whose converter is `body` and can be imported.

    Returns a log with the process id of each run, one per line.
    """
    source, log = tmp_path / "source", tmp_path / "log"
    source.mkdir(exist_ok=True)
    log.touch()
    (source / "convert_hf_to_gguf.py").write_text(
        f"import os, shutil, sys, time\nopen({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n{body}\n"
    )
    monkeypatch.setenv("ROTARY_LLAMA_CPP_DIR", str(source))
    monkeypatch.setattr(folders, "_MODULES", ("numpy",))
    return log


def copying(model: Path) -> str:
    return f"shutil.copy({str(model)!r}, sys.argv[3])"


def test_folders_go_through_llama_cpps_converter(folder, results, tiny_model, tmp_path, monkeypatch):
    log = stand_in(tmp_path, monkeypatch, copying(tiny_model))
    bars: dict[str, int] = {}

    @contextlib.contextmanager
    def bar(what: str, _: int) -> Iterator[Callable[[int], None]]:
        bars[what] = 0

        def progress(n_bytes: int) -> None:
            bars[what] += n_bytes

        yield progress

    (planned,) = convert(folder, results / "out.gguf", dry_run=True)
    assert_nothing_else(results)
    assert not log.read_text()
    (out,) = convert(folder, results / "out.gguf", bar=bar)
    assert out == planned
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
    assert_nothing_else(results, out)
    assert bars["read safetensors"] == tiny_model.stat().st_size


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(), "exists; give --force"),
        (Options(wish=Wish("NOPE")), "type 'NOPE'"),
        (Options(wish=Wish(types=("(=Q8_0",))), "regular expression"),
        (Options(alignment=48), "powers of two"),
        (Options(profile="none"), "none: "),
        (Options(force=True), "40 MiB needed, 39 MiB free"),
    ],
)
def test_what_is_wrong_is_found_before(
    folder, results, tiny_model, tmp_path, monkeypatch, options, text, dry_run
):
    log = stand_in(tmp_path, monkeypatch, copying(tiny_model))
    os.truncate(folder / "model.safetensors", 20 * MIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 39 * MIB}))
    (results / "out.gguf").write_text("old")
    with pytest.raises(RotaryError, match=text):
        convert(folder, results / "out.gguf", options, dry_run=dry_run)
    assert not log.read_text() and (results / "out.gguf").read_text() == "old"
    assert_nothing_else(results, results / "out.gguf")


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("changed", [None, "folder/config.json", "results/out.gguf.folder.part"])
def test_an_interrupted_one_goes_on(folder, results, tiny_model, tmp_path, monkeypatch, changed):
    """It resumes from the GGUF that was made, if that and all files of the folder are unchanged."""
    log = stand_in(tmp_path, monkeypatch, copying(tiny_model))
    os.truncate(folder / "model.safetensors", 22 * MIB)
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", at_call(60, real, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(folder, results / "out.gguf")
    monkeypatch.setattr(os, "copy_file_range", real)
    if changed:
        with open(tmp_path / changed, "r+b") as file:
            file.write(b"[]")
    else:  # both temporary files already have all the space they need
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": MIB}))
    said: list[str] = []
    (out,) = convert(folder, results / "out.gguf", say=said.append)
    assert len(log.read_text().splitlines()) == 1 + bool(changed)
    assert bool(changed) != any("reusing out.gguf.folder.part" in line for line in said)
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
    assert_nothing_else(results, out)


def test_an_interrupted_converter_leaves_nothing(folder, results, tiny_model, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, f"{copying(tiny_model)}; time.sleep(3600)")
    said: list[str] = []

    @contextlib.contextmanager
    def bar(_what: str, _n_bytes: int) -> Iterator[Callable[[int], None]]:
        def progress(n_bytes: int) -> None:
            if n_bytes:
                raise KeyboardInterrupt

        yield progress

    with pytest.raises(KeyboardInterrupt):
        convert(folder, results / "out.gguf", say=said.append, bar=bar)
    assert said[-1] == "interrupted; no files are left"
    assert_nothing_else(results)


@pytest.mark.parametrize("what", ["another conversion", "a changing folder"])
def test_what_happens_meanwhile_is_noticed(folder, results, tiny_model, tmp_path, monkeypatch, what):
    stand_in(tmp_path, monkeypatch, copying(tiny_model))
    real = folders.to_gguf

    def meddle(*args: Any) -> None:
        real(*args)
        if what == "a changing folder":
            (folder / "config.json").write_text("[]")
        else:
            with pytest.raises(RotaryError, match="being converted by another process"):
                convert(folder, results / "out.gguf")

    monkeypatch.setattr(folders, "to_gguf", meddle)
    if what == "a changing folder":
        with pytest.raises(ModelError, match=r"config\.json: changed while"):
            convert(folder, results / "out.gguf")
        assert_nothing_else(results)
    else:
        assert_nothing_else(results, *convert(folder, results / "out.gguf"))


KILLED = """
import sys
from rotary_llamacpp.conversion import folders
from rotary_llamacpp.conversion.convert import convert
folders._MODULES = ("numpy",)
convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_the_converter_ends_with_its_parent(folder, results, tiny_model, tmp_path, monkeypatch, how):
    log = stand_in(tmp_path, monkeypatch, f"{copying(tiny_model)}; time.sleep(3600)")
    made = results / "out.gguf.folder.part"
    command = [sys.executable, "-c", KILLED, folder, results / "out.gguf"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, preexec_fn=heed_hang_ups)
    until(lambda: made.exists() and made.stat().st_size == tiny_model.stat().st_size)
    process.send_signal(how)
    assert process.wait() == -how
    until(lambda: has_ended(log.read_text().strip()))
    # Even if the old converter still wrote, it would not write to the file of the next conversion.
    with open(made, "r+b") as theirs:
        stand_in(tmp_path, monkeypatch, copying(tiny_model))
        (out,) = convert(folder, results / "out.gguf")
        assert os.fstat(theirs.fileno()).st_nlink == 0
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
    assert_nothing_else(results, out)


def until(done: Callable[[], bool]) -> None:
    with no_hang():
        while not done():
            time.sleep(0.005)


def has_ended(pid: str) -> bool:
    """Whether a process is gone or a zombie: not every init reaps orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_folders_that_cannot_be_converted(folder, results, tmp_path, monkeypatch):
    stand_in(
        tmp_path, monkeypatch, "open(sys.argv[3], 'w').write('half'); sys.exit('Model Foo is not supported')"
    )
    with pytest.raises(ModelError, match="failed, Model Foo is not supported"):
        convert(folder, results / "out.gguf")
    monkeypatch.setattr(folders, "_MODULES", ("numpy", "no_such_module"))
    with pytest.raises(RotaryError, match=r"no_such_module cannot be imported.*pip install -r"):
        convert(folder, results / "out.gguf")
    monkeypatch.setenv("ROTARY_LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(RotaryError, match=r"missing.*make setup"):
        convert(folder, results / "out.gguf")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"1 safetensors files and no config\.json"):
        convert(folder, results / "out.gguf")
    assert_nothing_else(results)
