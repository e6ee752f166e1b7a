# SPDX-License-Identifier: MIT
"""Conversions that fail: nothing is left, and what is said."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_convert import assert_nothing_else, tensor_bytes, write_legacy

from rotary_llamacpp import copying, folders, quantising
from rotary_llamacpp.convert import Options, convert
from rotary_llamacpp.errors import ModelError, RotaryError
from rotary_llamacpp.gguf_header import read_header
from rotary_llamacpp.journal import Journal, part

MIB = 1 << 20


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies a MiB at a time, and notes each 2 MiB."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(copying, "_NOTE_BYTES", 2 * MIB)


def at_call(number: int, function: Callable[..., Any], fault: BaseException) -> Callable[..., Any]:
    """The same function, but for its `number`th call."""
    calls = iter(range(1, 1 << 30))

    def faulty(*args: Any) -> Any:
        if next(calls) == number:
            raise fault
        return function(*args)

    return faulty


# ---- failures ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("call", ["copy_file_range", "fdatasync", "fsync", "replace", "posix_fallocate"])
@pytest.mark.parametrize("number", [1, 2])
def test_no_failure_leaves_a_file(tiny_model, tmp_path, monkeypatch, call, number):
    split = Options(split_bytes=12 * MIB)
    fault = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, call, at_call(number, getattr(os, call), fault))
    with pytest.raises(RotaryError, match=r"No space left on device.*free some space") as caught:
        convert(tiny_model, tmp_path / "out.gguf", split)
    assert "\n" not in str(caught.value)
    assert_nothing_else(tmp_path)
    monkeypatch.undo()
    assert len(convert(tiny_model, tmp_path / "out.gguf", split)) == 2


def test_a_full_disk_is_seen_before(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 20 * MIB}))
    with pytest.raises(RotaryError, match="22 MiB wanted, 20 MiB free"):
        convert(tiny_model, tmp_path / "out.gguf")
    with pytest.raises(RotaryError, match=r"2\d MiB wanted, 20 MiB free"):
        convert(tiny_model, tmp_path / "out.gguf", Options(wish=quantising.Wish("Q4_0")))
    assert_nothing_else(tmp_path)


def test_without_the_kernels_help_the_copy_is_the_same(tiny_model, tmp_path, monkeypatch):
    def not_here(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (one,) = convert(tiny_model, tmp_path / "one.gguf")
    for name, function in {"raises": not_here, "nothing": lambda *_: 0}.items():
        monkeypatch.setattr(os, "copy_file_range", function)
        (other,) = convert(tiny_model, tmp_path / f"{name}.gguf", Options(verify=True))
        assert one.read_bytes() == other.read_bytes(), name


def test_verify_names_the_tensor_that_differs(tiny_model, tmp_path, monkeypatch):
    check = copying.check_headers

    def spoil(layout: Any) -> None:
        check(layout)
        at = next(at for weight, at in layout.weights if weight.name == "blk.3.ffn_up_exps.weight")
        with open(part(layout.outputs[0].path), "r+b") as file:
            file.seek(at + 70_000)
            byte = file.read(1)
            file.seek(at + 70_000)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(copying, "check_headers", spoil)
    with pytest.raises(RotaryError, match=r"blk\.3\.ffn_up_exps\.weight differs"):
        convert(tiny_model, tmp_path / "out.gguf", Options(verify=True))
    assert_nothing_else(tmp_path)


@pytest.mark.usefixtures("small_steps")
def test_a_source_that_changes_meanwhile_is_noticed(tiny_model, tmp_path, monkeypatch):
    for how in ("shorter", "touched"):
        source = tmp_path / f"{how}.gguf"
        source.write_bytes(tiny_model.read_bytes())
        folder = tmp_path / how
        folder.mkdir()
        real, calls = os.copy_file_range, []

        def meddle(*args: Any, source=source, how=how, real=real, calls=calls) -> int:
            calls.append(args)
            if len(calls) == 4:
                if how == "shorter":
                    os.truncate(source, 4 * MIB)
                os.utime(source, ns=(1, 1))
            return real(*args)

        monkeypatch.setattr(os, "copy_file_range", meddle)
        with pytest.raises(ModelError, match=r"ends at byte|changed while"):
            convert(source, folder / "out.gguf")
        monkeypatch.undo()
        monkeypatch.setattr(copying, "CHUNK_BYTES", MIB)
        assert_nothing_else(folder)


def test_places_that_cannot_be_written(tiny_model, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_model.read_bytes())
    for out, text in (
        (model, "is read and written"),
        (tmp_path / "none" / "out.gguf", "no such folder"),
    ):
        with pytest.raises(RotaryError, match=text):
            convert(model, out, Options(force=True))
    shards = convert(model, tmp_path / "s.gguf", Options(split_bytes=12 * MIB))
    with pytest.raises(RotaryError, match="first"):
        convert(shards[1], tmp_path / "out.gguf")
    held = Journal(tmp_path / "out.gguf", {})
    try:
        with pytest.raises(RotaryError, match="being converted by another process"):
            convert(model, tmp_path / "out.gguf")
    finally:
        held.close(remove=True)
    assert_nothing_else(tmp_path, model, *shards)


def test_damaged_legacy_layouts_are_refused(synthetic, tmp_path):
    model = synthetic("test-llama", type="q8_0", layers=2, experts=12, used=2)
    legacy = tmp_path / "legacy.gguf"
    write_legacy(model, legacy)
    whole = legacy.read_bytes()
    for before, after, text in (
        (b"blk.1.ffn_up.7.weight", b"blk.1.ffn_no.7.weight", "lacks expert 7, 11 are there"),
        (b"blk.1.ffn_up.7.weight", b"blk.1.ffn_up.6.weight", "a second time"),
        (b"blk.1.ffn_up.10.weight", b"blk.1.ffn_up.07.weight", "is there twice"),
    ):
        legacy.write_bytes(whole.replace(before, after))
        with pytest.raises(ModelError, match=text):
            convert(legacy, tmp_path / "out.gguf")
    assert_nothing_else(tmp_path, legacy)


def test_a_quantiser_that_fails_leaves_nothing(tiny_model, tmp_path):
    for wish, text in (
        (quantising.Wish(types=("(?P<x>_exps)=Q4_0",)), "not quantised"),  # no such groups in C++
    ):
        with pytest.raises(ModelError, match=text):
            convert(tiny_model, tmp_path / "out.gguf", Options(wish=wish))
    broken = tmp_path / "unknown.gguf"
    broken.write_bytes(tiny_model.read_bytes().replace(b"qwen3moe", b"qwen3mow"))
    with pytest.raises(ModelError, match="unknown model architecture"):
        convert(broken, tmp_path / "out.gguf", Options(wish=quantising.Wish("Q4_0")))
    assert_nothing_else(tmp_path, broken)


# ---- Hugging Face folders ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As much of a Hugging Face folder as is looked at before the converter."""
    made = tmp_path / "folder"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(100))
    return made


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A llama.cpp source whose converter is `body`, and whose imports are there."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "convert_hf_to_gguf.py").write_text(f"import shutil, sys\n{body}\n")
    monkeypatch.setenv("ROTARY_LLAMA_CPP_DIR", str(source))
    monkeypatch.setattr(folders, "_MODULES", ("numpy",))


def test_folders_go_through_llama_cpps_converter(folder, tiny_model, tmp_path, monkeypatch):
    """With a converter that stands in for it; test_hugging_face.py has the real one."""
    stand_in(tmp_path, monkeypatch, f"shutil.copy({str(tiny_model)!r}, sys.argv[3])")
    results = tmp_path / "results"
    results.mkdir()
    (planned,) = convert(folder, results / "out.gguf", dry_run=True)
    assert_nothing_else(results)
    (out,) = convert(folder, results / "out.gguf")
    assert out == planned
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
    assert_nothing_else(results, out)


def test_folders_that_cannot_be_converted(folder, tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    stand_in(
        tmp_path, monkeypatch, "open(sys.argv[3], 'w').write('half'); sys.exit('Model Foo is not supported')"
    )
    with pytest.raises(ModelError, match="failed, Model Foo is not supported"):
        convert(folder, results / "out.gguf")
    monkeypatch.setattr(folders, "_MODULES", ("numpy", "no_such_module"))
    with pytest.raises(RotaryError, match=r"no_such_module cannot be imported.*pip install -r"):
        convert(folder, results / "out.gguf")
    monkeypatch.setenv("ROTARY_LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(RotaryError, match=r"not there.*make setup"):
        convert(folder, results / "out.gguf")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"1 safetensors files and no config\.json"):
        convert(folder, results / "out.gguf")
    assert_nothing_else(results)
