# SPDX-License-Identifier: MIT
"""Layouts of random models, made up by hypothesis, and headers that are damaged at any byte."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.errors import ModelError, RotaryError
from rotary_llamacpp.gguf_files.fields import array_strings, encode, raw_fields
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.gguf_files.info import read_shards
from rotary_llamacpp.gguf_files.layout import lay_out, shard_paths
from tests.support import no_hang
from tests.support.conversions import tensor_bytes
from tests.support.work import Calls
from tests.unit.test_gguf_header import measured

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34)}


@dataclass(frozen=True)
class Made:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def n_bytes(self) -> int:
        block, block_bytes = BLOCKS[self.kind]
        return prod(self.shape) // block * block_bytes


def write_gguf(path: Path, tensors: Sequence[Made], alignment: int, fields: Sequence[bytes] = ()) -> None:
    """Write a GGUF file by the format's specification, with different data in each tensor."""
    fields = [encode("general.architecture", "test"), encode("general.alignment", alignment), *fields]
    infos, data = b"", b""
    for number, tensor in enumerate(tensors):
        name = tensor.name.encode()
        infos += struct.pack("<Q", len(name)) + name
        infos += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        infos += struct.pack("<IQ", tensor.kind, len(data))
        data += (bytes(range(number % 7, 251)) * (tensor.n_bytes // 200 + 1))[: tensor.n_bytes]
        data += b"\xff" * (-len(data) % alignment)  # padding that must not be copied
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields) + infos
    path.write_bytes(header + bytes(-len(header) % alignment) + data)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Made], int]:
    """Tensors in random order, and their alignment: experts apart, fused, in single tensors, and others."""
    tensors = []
    for layer in range(draw(st.integers(0, 3))):
        kinds = st.sampled_from(list(BLOCKS))
        rows, n_expert = draw(st.integers(1, 5)), draw(st.integers(1, 4))
        columns = 32 * draw(st.integers(1, 5))
        layout = draw(st.sampled_from(["apart", "fused", "single", "dense"]))
        names = {
            "apart": ("gate", "up", "down"),
            "fused": ("gate_up", "down"),
            "single": ("gate", "up", "down"),
        }
        for name in names.get(layout, ()):
            kind = draw(kinds)
            if layout == "single":
                for expert in range(n_expert):
                    tensors.append(Made(f"blk.{layer}.ffn_{name}.{expert}.weight", (columns, rows), kind))
            else:
                shape = (columns, rows, n_expert)
                tensors.append(Made(f"blk.{layer}.ffn_{name}_exps.weight", shape, kind))
        tensors.append(Made(f"blk.{layer}.attn_q.weight", (columns, rows), draw(kinds)))
        tensors.append(Made(f"blk.{layer}.ffn_gate_exps.bias", (rows, n_expert), F32))
        tensors.append(Made(f"blk.{layer}.attn_k_b.weight", (32, rows, 2), draw(kinds)))  # 3-D, no experts
    tensors.append(Made("output_norm.weight", (draw(st.integers(1, 70)),), F32))
    return draw(st.permutations(tensors)), draw(st.sampled_from([32, 64, 4096]))


@settings(max_examples=60)
@given(
    model=models(),
    alignment=st.sampled_from([32, 512, 4096]),
    split_bytes=st.one_of(st.none(), st.integers(1, 40_000)),
)
def test_any_layout_comes_out_whole_and_in_order(model, alignment, split_bytes):
    tensors, before = model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.gguf"
        write_gguf(source, tensors, before)
        paths = convert(source, folder / "out.gguf", Options(alignment, split_bytes, verify=True))
        headers = read_shards(paths[0])
        assert [header.path for header in headers] == paths
        assert sorted(folder.iterdir()) == sorted([source, *paths])
        found = tensor_bytes(headers)
        joined: dict[str, bytes] = {}
        for name_, (_, _, data) in sorted(tensor_bytes([read_header(source)]).items()):
            stem, _, number = name_.removesuffix(".weight").rpartition(".")
            key = f"{stem}_exps.weight" if number.isdigit() and "ffn_" in stem else name_
            joined[key] = joined.get(key, b"") + data
        assert {key: data for key, (_, _, data) in found.items()} == joined
        order = [tensor.name for header in headers for tensor in header.tensors]
        experts = [i for i, key in enumerate(order) if key.endswith("_exps.weight")]
        assert experts == list(range(len(order) - len(experts), len(order)))
        layers = [int(order[i].split(".")[1]) for i in experts]
        assert layers == sorted(layers)
        for header in headers:
            assert header.alignment == alignment
            assert header.n_bytes % alignment == 0
            assert split_bytes is None or header.n_bytes <= split_bytes or len(header.tensors) == 1
            # llama.cpp requires each tensor to follow the padding of the one before directly.
            at = header.tensors[0].offset
            for tensor in header.tensors:
                assert tensor.offset == at
                at += -(-tensor.n_bytes // alignment) * alignment
            GGUFReader(header.path)  # accepts it too


# ---- damage ------------------------------------------------------------------------------------------


def small_model() -> bytes:
    """A small file with each kind of field and tensor."""
    fields = [
        encode("test.count", 3), encode("test.name", "a name"), encode("test.bytes", bytes(9)),
        encode("test.words", ["a", "bb", ""]), encode("test.short", 1, "H"),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        tensors = [Made("blk.0.ffn_up_exps.weight", (32, 2, 2), Q8_0), Made("output.weight", (32, 2), F32)]
        write_gguf(path, tensors, 32, fields)
        return path.read_bytes()


SMALL = small_model()


@settings(max_examples=300)
@given(
    changes=st.lists(
        st.tuples(st.integers(4, len(SMALL) - 1), st.sampled_from([0, 1, 8, 9, 10, 0x7F, 0x80, 0xFF])),
        max_size=4,
    ),
    n_bytes=st.one_of(st.just(len(SMALL)), st.integers(0, len(SMALL))),
)
def test_damage_ends_in_one_line_or_in_a_whole_file(changes, n_bytes):
    data = bytearray(SMALL)
    for at, byte in changes:
        data[at] = byte
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "in.gguf", Path(name) / "out.gguf"
        source.write_bytes(data[:n_bytes])
        try:
            with Calls() as calls:
                convert(source, out, Options(verify=True))
        except RotaryError as error:
            assert calls.n < 100_000
            assert "\n" not in str(error)
            assert list(Path(name).iterdir()) == [source]
        else:
            read_header(out)


ONE_FIELD = struct.pack("<QQ", 0, 1)

HUGE = """
import os, sys
from rotary_llamacpp.conversion.convert import convert
from rotary_llamacpp.errors import RotaryError
from tests.support.work import Calls, peak_kib
before = peak_kib()
with Calls() as calls:
    try:
        print(len(convert(sys.argv[1], sys.argv[2])), "made")
    except RotaryError as error:
        print(error)
print(calls.n)
print(peak_kib() - before)
"""


@pytest.mark.parametrize(
    ("header", "text"),
    [
        # The file is followed by 64 GiB of zeros, so that every count fits into it.
        (struct.pack("<QQ", 1 << 30, 0), "1073741824 items announced"),
        (struct.pack("<QQ", 0, 1 << 30), "1073741824 items announced"),
        (ONE_FIELD + encode("k", ["x"])[:-17] + struct.pack("<Q", 1 << 32), "strings in arrays"),
        (ONE_FIELD + encode("k", b"x")[:-9] + struct.pack("<Q", 1 << 35), "metadata of over"),
        (ONE_FIELD + encode("k", "x")[:-9] + struct.pack("<Q", 1 << 35), "metadata of over"),
        (ONE_FIELD + struct.pack("<Q", 1 << 35), "a name of"),
    ],
)
def test_damage_of_a_large_file_costs_neither_time_nor_memory(tmp_path, header, text):
    model = tmp_path / "model.gguf"
    with open(model, "wb") as file:
        file.write(b"GGUF" + struct.pack("<I", 3) + header)
        file.truncate(64 << 30)
    said, n_calls, kib = measured(HUGE, model, tmp_path / "out.gguf")
    assert text in said and n_calls < 100_000 and kib < 100_000
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Convert 16 MiB and 256 MiB of experts without the kernel's copy, whose memory is not the process's."""
    code = HUGE.replace("\nbefore =", "\nos.copy_file_range = lambda *_: 0\nbefore =", 1)
    used = []
    for n_expert in (16, 256):
        model = tmp_path / f"{n_expert}.gguf"
        tensor = Made("blk.0.ffn_up_exps.weight", (256, 1024, n_expert), F32)
        write_gguf(model, [Made(tensor.name, (256, 1024, 0), F32)], 32)
        data = bytearray(model.read_bytes())
        at = data.index(struct.pack("<QQQ", 256, 1024, 0)) + 16
        data[at : at + 8] = struct.pack("<Q", n_expert)
        with open(model, "wb") as file:
            file.write(data)
            file.truncate(len(data) + tensor.n_bytes)
        said, _, kib = measured(code, model, tmp_path / "out.gguf")
        assert said == "1 made" and (tmp_path / "out.gguf").stat().st_size >= tensor.n_bytes
        (tmp_path / "out.gguf").unlink()
        used.append(kib)
    assert used[1] < used[0] + 16_384, "KiB"


def test_overlapping_tensors_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, [Made("a.weight", (64,), F32), Made("b.weight", (64,), F32)], 32)
    data = path.read_bytes()
    at = data.rindex(struct.pack("<IQ", F32, 256)) + 4
    path.write_bytes(data[:at] + struct.pack("<Q", 128) + data[at + 8 :])
    with pytest.raises(ModelError, match=r"b\.weight begins at byte .* tensors do not overlap"):
        convert(path, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("blk.0.ffn_up_exps.weight", (0, 1, 1 << 40), "1 to 2"),
        ("blk.0.ffn_up_exps.weight", (32, 2, 0), "1 to 2"),
        ("blk.0.ffn_up_exps.weight", (1, 1, (1 << 16) + 1), "at most 65536 experts"),
        ("output.weight", (32, 0), "1 to 2"),
        ("x" * 64, (32, 2), "a name of 64 bytes"),
        # Tensors whose names are not those of experts are copied as they are.
        ("blk.0.ffn_up_exps.weight", (1, 1, 1 << 16), ""),
        ("blk.1234567.ffn_up.0.weight", (32, 2), ""),
        (f"blk.0.ffn_up.{'1' * 40}.weight", (32, 2), ""),
        ("x" * 63, (32, 2), ""),
    ],
)
def test_made_up_tensors(tmp_path, name, shape, text):
    path, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    write_gguf(path, [Made(name, shape, F32)], 32)
    with no_hang():
        if text:
            with pytest.raises(ModelError, match=text):
                convert(path, out)
        else:
            convert(path, out)
            assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(path)])


def test_limits_of_splitting(tiny_model):
    headers = [read_header(tiny_model)]
    out = Path("out-00001-of-00007.gguf")
    assert [str(path) for path in shard_paths(out, 2)] == [f"out-0000{i}-of-00002.gguf" for i in (1, 2)]
    layout = lay_out(headers, out, split_bytes=1)
    assert f"out-00001-of-{len(layout.outputs):05d}.gguf has " in layout.describe()
    assert len(layout.outputs) == 74 and all(len(output.weights) == 1 for output in layout.outputs)
    for alignment in (0, 16, 48, 1 << 31):
        with pytest.raises(RotaryError, match="powers of two"):
            lay_out(headers, out, alignment=alignment)


def test_own_fields_are_read_back(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, [Made("a.weight", (64,), F32)], 32, [encode("x.words", ["one", "", "drei ß"])])
    assert array_strings(raw_fields(read_header(path))["x.words"], "x.words") == ["one", "", "drei ß"]
    assert array_strings(encode("x.words", 3), "x.words") == []
    field = GGUFReader(path).get_field("x.words")
    assert field is not None and field.contents() == ["one", "", "drei ß"]
