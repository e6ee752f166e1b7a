# SPDX-License-Identifier: MIT
"""Reads the header of one GGUF file: its metadata and where its tensors lie. Never touches the weights.

gguf.GGUFReader is not used for this: it makes several numpy arrays per vocabulary entry (tens of seconds for
a vocabulary of 150 000) and loops for hours on a damaged count. Here every count is checked against the bytes
that are left, and every name against those before, so a damaged file of any size raises ModelError at once.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUFValueType

from ..errors import ModelError
from ..host.files import check_regular

_SCALARS: dict[int, str] = {  # struct's codes
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_MAX_KEPT_ARRAY = 4096  # values; per-layer values are kept, vocabularies are skipped
_MAX_KEPT_VALUES = 1 << 20  # of all arrays; later ones are skipped
_MAX_KEPT_BYTES = 1 << 24  # of all keys, and of all strings; a chat template has some thousand
_MAX_KEY_BYTES = 65535  # as in the format
_MAX_NAME_BYTES = 63  # of the name of a tensor, as in llama.cpp
_MAX_STRINGS = 1 << 21  # in arrays of one header; large vocabularies with merges are under a million
_MAX_METADATA_BYTES = 1 << 29  # large vocabularies have some ten million
# More than any model has. A hole in a file reads as zeros, which are valid empty entries: without these
# limits a damaged count in a large file would be read for hours.
_MAX_TENSORS, _MAX_FIELDS = 1 << 16, 1 << 14
_SIZES = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
_TYPE_NAMES = {int(kind): kind.name for kind in GGML_QUANT_SIZES}
_SIZES.setdefault(42, (64, 18))  # in the pinned llama.cpp, but not in every gguf package
_TYPE_NAMES.setdefault(42, "Q2_0")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `shape` is in ggml's order, fastest first, `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int
    type_number: int


@dataclass(frozen=True)
class Field:
    """One key and the bytes that encode it and its value: from `start` to before `end`."""

    key: str
    start: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors of one file.

    `metadata` leaves out arrays of strings, arrays of over 4096 values, and what comes after a million values
    or 16 MiB of strings; `fields` has all, as ranges of the file.
    """

    path: Path
    n_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    fields: tuple[Field, ...]
    alignment: int


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read one GGUF file's header.

    Raises
    ------
    ModelError
        The file is missing, not a GGUF, of an unsupported version, or truncated.
    """
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes < 24 or file.read(4) != b"GGUF":
                raise ModelError(
                    f"{path}: not a GGUF file, {n_bytes} bytes; expected the magic 'GGUF'; give a .gguf model"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data).header()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read, {error.strerror}; give a readable .gguf file") from None


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 4
        self.strings = 0  # skipped in arrays so far
        self.values = self.bytes = 0  # kept so far, the latter of strings

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF version {version:#x}; 2 and 3 are supported; convert it again"
            )
        n_tensors, n_fields = self.count(24, _MAX_TENSORS), self.count(12, _MAX_FIELDS)
        metadata: dict[str, Any] = {}
        fields: dict[str, Field] = {}
        key_bytes = 0
        for _ in range(n_fields):
            start = self.at
            key = self.name(fields, _MAX_KEY_BYTES)
            value = self.value(self.scalar("I"))
            key_bytes += len(key)
            if self.at > _MAX_METADATA_BYTES or key_bytes > _MAX_KEPT_BYTES:
                raise self.damaged(
                    f"metadata of over {_MAX_METADATA_BYTES} bytes, or {_MAX_KEPT_BYTES} of keys,"
                )
            fields[key] = Field(key, start, self.at)
            if value is not None:
                metadata[key] = value
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            entry = self.tensor_entry(entries)
            entries[entry[0]] = entry
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"alignment is {str(alignment)[:40]!r}, not a power of two,")
        start = -(-self.at // alignment) * alignment
        tensors = self.placed(list(entries.values()), start)
        return GGUFHeader(self.path, self.size, metadata, tensors, tuple(fields.values()), alignment)

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int
    ) -> tuple[TensorInfo, ...]:
        offsets = sorted({entry[3] for entry in entries} | {self.size - start})
        following = dict(itertools.pairwise(offsets))
        tensors = []
        for name, shape, kind, offset in entries:
            n_elements = 1
            for extent in shape:
                n_elements *= extent
            if kind in _SIZES:
                block, block_bytes = _SIZES[kind]
                n_bytes = n_elements // block * block_bytes
            else:  # a type newer than our gguf package: the gap to the next tensor, padding included
                n_bytes = following.get(offset, offset) - offset
            if start + offset + n_bytes > self.size:
                raise ModelError(
                    f"{self.path}: truncated, tensor {name[:64]!r} ends at byte {start + offset + n_bytes}; "
                    f"the file has {self.size}; download or convert it again"
                )
            tensors.append(
                TensorInfo(name, shape, _TYPE_NAMES.get(kind, f"type {kind}"), start + offset, n_bytes, kind)
            )
        return tuple(tensors)

    def tensor_entry(self, known: Container[str]) -> tuple[str, tuple[int, ...], int, int]:
        name = self.name(known, _MAX_NAME_BYTES)
        n_dims = self.scalar("I")
        if n_dims > 8:
            raise self.damaged(f"tensor {name[:64]!r} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))
        return name, shape, self.scalar("I"), self.scalar("Q")

    def name(self, known: Container[str], longest: int) -> str:
        """Read a key or a tensor's name, which must not be empty, unprintable or known already."""
        length = self.scalar("Q")
        if not 0 < length <= longest:
            raise self.damaged(f"a name of {length} bytes, {longest} at most,")
        self.advance(length)
        name = self.data[self.at - length : self.at].decode("utf-8", "replace")
        if name in known or not name.isprintable():
            raise self.damaged(f"{name!r} appears twice" if name in known else f"{name!r} as a name")
        return name

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            raise self.damaged(f"unknown value type {kind}")
        item = self.scalar("I")
        if item == GGUFValueType.STRING:
            self.pass_strings(self.count(8))
            return None
        if item not in _SCALARS:
            raise self.damaged(f"unknown array item type {item}")
        width = struct.calcsize("<" + _SCALARS[item])
        n_items = self.count(width)
        at = self.at
        self.advance(n_items * width)
        if n_items > min(_MAX_KEPT_ARRAY, _MAX_KEPT_VALUES - self.values):
            return None
        self.values += n_items
        return list(struct.unpack_from(f"<{n_items}{_SCALARS[item]}", self.data, at))

    def pass_strings(self, n_items: int) -> None:
        self.strings += n_items
        if self.strings > _MAX_STRINGS:
            raise self.damaged(f"{self.strings} strings in arrays, over {_MAX_STRINGS}")
        at, size, data, length_at = self.at, self.size, self.data, struct.Struct("<Q").unpack_from
        for _ in range(n_items):
            if at > size - 8:
                self.at = at
                raise self.damaged("8 bytes wanted")
            at += 8 + length_at(data, at)[0]
        self.at = min(at, size)
        self.advance(at - self.at)

    def count(self, item_bytes: int, max_items: int | None = None) -> int:
        """Read a number of items, each of at least `item_bytes`, that must still fit into the file."""
        n_items = self.scalar("Q")
        if n_items * item_bytes > self.size - self.at or (max_items is not None and n_items > max_items):
            raise self.damaged(f"{n_items} items announced")
        return int(n_items)

    def string(self) -> str | None:
        length = self.scalar("Q")
        at = self.at
        self.advance(length)
        if length > _MAX_KEPT_BYTES - self.bytes:
            return None
        self.bytes += length
        return self.data[at : self.at].decode("utf-8", "replace")

    def scalar(self, code: str) -> Any:
        at = self.at
        self.advance(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, at)[0]

    def advance(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.at:
            raise self.damaged(f"{n_bytes} bytes wanted")
        self.at += n_bytes

    def damaged(self, what: str) -> ModelError:
        return ModelError(
            f"{self.path}: truncated or damaged header, {what} at byte {self.at}; "
            f"the file has {self.size}; download or convert it again"
        )
