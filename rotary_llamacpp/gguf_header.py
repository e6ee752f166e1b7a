# SPDX-License-Identifier: MIT
"""Reads the header of one GGUF file: its metadata and where its tensors lie. Never touches the weights.

gguf.GGUFReader is not used for this: it makes several numpy arrays per vocabulary entry (tens of seconds for
a vocabulary of 150 000) and loops for hours on a damaged count. Here every count is checked against the bytes
that are left, so a damaged file ends in a ModelError at once.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES

from .errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_LONGEST_KEPT_ARRAY = 4096  # per-layer values are kept, vocabularies are walked over
# More than any model has. A hole in a file reads as zeros, which are valid entries of no size: without these
# limits a damaged count in a large file would be walked for hours.
_MOST_TENSORS, _MOST_FIELDS, _MOST_STRINGS = 1 << 17, 1 << 14, 1 << 21
_SIZES = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
_TYPE_NAMES = {int(kind): kind.name for kind in GGML_QUANT_SIZES}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (fastest dimension first), `offset` in bytes from the file's
    start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors of one file. Arrays of strings, and arrays of over 4096 values, are left out."""

    path: Path
    n_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read one GGUF file's header.

    Raises
    ------
    ModelError
        The file is missing, not a GGUF, of an unsupported version, or truncated.
    """
    path = Path(path)
    try:
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
        self.n_strings = 0  # in arrays, so far

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF version {version:#x}; 2 and 3 are supported; convert it again"
            )
        n_tensors, n_fields = self.count(24, _MOST_TENSORS), self.count(12, _MOST_FIELDS)
        metadata = {}
        for _ in range(n_fields):
            key = self.string()
            value = self.value(self.scalar("I"))
            if value is not None:
                metadata[key] = value
        entries = [self.tensor_entry() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged(f"alignment is {str(alignment)[:40]!r}")
        start = -(-self.at // alignment) * alignment
        return GGUFHeader(self.path, self.size, metadata, self.placed(entries, start))

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
                TensorInfo(name, shape, _TYPE_NAMES.get(kind, f"type {kind}"), start + offset, n_bytes)
            )
        return tuple(tensors)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        n_dims = self.scalar("I")
        if n_dims > 8:
            raise self.damaged(f"tensor {name[:64]!r} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))
        return name, shape, self.scalar("I"), self.scalar("Q")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"unknown value type {kind}")
        item = self.scalar("I")
        if item == _STRING:
            n_items = self.count(8, _MOST_STRINGS - self.n_strings)
            self.n_strings += n_items
            for _ in range(n_items):
                self.advance(self.scalar("Q"))
            return None
        if item not in _SCALARS:
            raise self.damaged(f"unknown array item type {item}")
        width = struct.calcsize("<" + _SCALARS[item])
        n_items = self.count(width)
        at = self.at
        self.advance(n_items * width)
        if n_items > _LONGEST_KEPT_ARRAY:
            return None
        return list(struct.unpack_from(f"<{n_items}{_SCALARS[item]}", self.data, at))

    def count(self, item_bytes: int, most: int | None = None) -> int:
        """A number of items, each of at least `item_bytes`, that must still fit into the file."""
        n_items = self.scalar("Q")
        if n_items * item_bytes > self.size - self.at or (most is not None and n_items > most):
            raise self.damaged(f"{n_items} items announced")
        return int(n_items)

    def string(self) -> str:
        length = self.scalar("Q")
        at = self.at
        self.advance(length)
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
