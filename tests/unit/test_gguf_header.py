# SPDX-License-Identifier: MIT
"""Header reading: agreement with gguf.GGUFReader, and many kinds of damage."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGUFReader

from rotary_llamacpp.errors import ModelError
from rotary_llamacpp.gguf_files.header import read_header
from tests.support.processes import python


def test_agrees_with_ggufs_reader(tiny_model):
    header, reader = read_header(tiny_model), GGUFReader(tiny_model)
    ours = [(t.name, list(t.shape), t.type_name, t.offset, t.n_bytes) for t in header.tensors]
    theirs = [
        (t.name, t.shape.tolist(), t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert ours == theirs
    assert header.metadata["general.architecture"] == "qwen3moe"
    assert "tokenizer.ggml.tokens" not in header.metadata, "vocabularies are walked over, not kept"


@pytest.mark.parametrize("kept", [0, 3, 4, 23, 24, 100, 4000, "data", -1])
def test_truncation_anywhere_is_named(tiny_model, tmp_path, kept):
    data = tiny_model.read_bytes()
    header = read_header(tiny_model)
    n_bytes = {"data": header.tensors[0].offset + 1, -1: len(data) - 1}.get(kept, kept)
    short = tmp_path / "short.gguf"
    short.write_bytes(data[:n_bytes])
    with pytest.raises(ModelError, match=r"truncated|not a GGUF") as caught:
        read_header(short)
    assert "short.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [8, 16])  # the numbers of tensors and of fields
def test_absurd_counts_end_at_once(tiny_model, tmp_path, at):
    data = bytearray(tiny_model.read_bytes())
    data[at : at + 8] = struct.pack("<Q", 2**60)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        read_header(broken)


def test_absurd_array_ends_at_once(tmp_path):
    key = b"general.list"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 2**60)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(ModelError, match="damaged"):
        read_header(broken)


MEASURED = """
import sys
from rotary_llamacpp.errors import ModelError
from rotary_llamacpp.gguf_files.header import read_header
from tests.support.work import Calls, peak_kib
before = peak_kib()
with Calls() as calls:
    try:
        print(len(read_header(sys.argv[1]).metadata), "kept")
    except ModelError as error:
        print(error)
print(calls.n)
print(peak_kib() - before)
"""


def measured(script: str, *arguments: Path) -> tuple[str, int, int]:
    """Run a script that prints three lines: a text, a number of calls, and KiB of memory."""
    said, n_calls, kib = python(script, *arguments).stdout.splitlines()
    return said, int(n_calls), int(kib)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("n_tensors", "n_fields", "part", "more_bytes", "said"),
    [
        # Just below the limits; values that are not kept must not be read into memory.
        (
            0,
            999,
            lambda i: text(b"%d" % i) + struct.pack("<IIQ", 9, 5, 4096) + bytes(16384),
            0,
            "256 kept",
        ),
        (0, 20, lambda i: text(b"%d" % i) + struct.pack("<IQ", 8, 1 << 22) + b"a" * (1 << 22), 0, "4 kept"),
        (0, 1, lambda i: text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 21), 1 << 24, "0 kept"),
        (0, 400, lambda i: text(b"%060000d" % i) + struct.pack("<IB", 0, 1), 0, "of keys"),
        (1 << 16, 0, lambda i: text(b"%063d" % i) + struct.pack("<IQIQ", 1, 0, 0, 0), 32, "0 kept"),
    ],
)
def test_large_headers_cost_little(tmp_path, n_tensors, n_fields, part, more_bytes, said):
    path = tmp_path / "large.gguf"
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields))
        file.writelines(map(part, range(n_tensors + n_fields)))
        file.truncate(file.tell() + more_bytes)
    found, n_calls, kib = measured(MEASURED, path)
    assert said in found and n_calls < 3_000_000 and kib < 80_000


def test_unknown_type_is_measured_by_the_gap(tiny_model, tmp_path):
    header = read_header(tiny_model)
    first = header.tensors[0]
    data = bytearray(tiny_model.read_bytes())
    name = struct.pack("<Q", len(first.name)) + first.name.encode()
    at = data.index(name) + len(name) + 4 + 8 * len(first.shape)
    data[at : at + 4] = struct.pack("<I", 999)
    newer = tmp_path / "newer.gguf"
    newer.write_bytes(data)
    found = read_header(newer).tensors[0]
    assert found.type_name == "type 999"
    assert 0 <= found.n_bytes - first.n_bytes < 32


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"GGUF" + b"\x00\x00\x00\x03" * 6, "version"), (b"hello world, this is text", "not a GGUF")],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        read_header(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        read_header(Path("no-such.gguf"))
    with pytest.raises(ModelError, match="cannot be read"):
        read_header(tmp_path)
