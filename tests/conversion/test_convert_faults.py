# SPDX-License-Identifier: MIT
"""Conversions that fail: they leave no file, and their messages."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest

from rotary_llamacpp.conversion import copying, quantising
from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.conversion.journal import part
from rotary_llamacpp.errors import ModelError, RotaryError
from tests.support.conversions import MIB, assert_nothing_else, at_call, write_legacy

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
    with pytest.raises(RotaryError, match="22 MiB needed, 20 MiB free"):
        convert(tiny_model, tmp_path / "out.gguf")
    with pytest.raises(RotaryError, match=r"2\d MiB needed, 20 MiB free"):
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
@pytest.mark.parametrize("how", ["shorter", "touched", "touched while it is quantised"])
def test_a_source_that_changes_meanwhile_is_noticed(tiny_model, tmp_path, monkeypatch, how):
    source, folder = tmp_path / "model.gguf", tmp_path / "results"
    source.write_bytes(tiny_model.read_bytes())
    folder.mkdir()

    def meddle(*args: Any, real: Callable[..., Any], calls: Iterator[int]) -> Any:
        if next(calls) == 0:
            if how == "shorter":
                os.truncate(source, 4 * MIB)
            os.utime(source, ns=(1, 1))
        return real(*args)

    real_copy, real_quantise, wish = os.copy_file_range, quantising.quantise, quantising.Wish()
    if "quantised" in how:
        wish = quantising.Wish("Q4_0")
        monkeypatch.setattr(quantising, "quantise", partial(meddle, real=real_quantise, calls=count()))
    else:
        monkeypatch.setattr(os, "copy_file_range", partial(meddle, real=real_copy, calls=count(-3)))
    with pytest.raises(ModelError, match=r"model\.gguf: (ends at byte|changed while)"):
        convert(source, folder / "out.gguf", Options(wish=wish))
    assert_nothing_else(folder)


def test_damaged_legacy_layouts_are_refused(synthetic, tmp_path):
    model = synthetic("test-llama", type="q8_0", layers=2, experts=12, used=2)
    legacy = tmp_path / "legacy.gguf"
    write_legacy(model, legacy)
    whole = legacy.read_bytes()
    for before, after, text in (
        (b"blk.1.ffn_up.7.weight", b"blk.1.ffn_no.7.weight", "lacks expert 7, has 11 others"),
        (b"blk.1.ffn_up.7.weight", b"blk.1.ffn_up.6.weight", "appears twice"),
        (b"blk.1.ffn_up.10.weight", b"blk.1.ffn_up.07.weight", "appears twice"),
    ):
        legacy.write_bytes(whole.replace(before, after))
        with pytest.raises(ModelError, match=text):
            convert(legacy, tmp_path / "out.gguf")
    assert_nothing_else(tmp_path, legacy)
