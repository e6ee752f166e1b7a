# SPDX-License-Identifier: MIT
"""Lays out a converted model: order, alignment and shards of the tensors, and the headers.

Reads the sources' headers and no weights; copying.py copies those. In the format every tensor begins at the
next multiple of general.alignment, so one number aligns all of them. An expert begins inside its tensor at a
multiple of its own size, whatever the alignment; `Layout.describe` says where that is not a page boundary.

Metadata is copied as raw bytes, so that no type, order or invalid text changes; gguf.GGUFWriter would decode
and encode every word of a vocabulary.

Format and names of shards: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, llama.cpp's gguf-split.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import RotaryError
from ..units import mib
from .fields import encode, raw_fields, text_bytes
from .header import GGUFHeader
from .info import SHARD
from .weights import Weight, weights_of

PAGE = 4096  # bytes that any disk can read directly
SECTOR = 512  # bytes that most disks can read directly
OURS = "rotary."  # prefix of this package's keys
_MAX_SHARDS = 65535  # split.count is 16 bits


@dataclass(frozen=True)
class Output:
    """One file of the result: `header` with its padding, then each weight at its offset from byte 0."""

    path: Path
    header: bytes
    weights: tuple[tuple[Weight, int], ...]
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """All files of the result, with notes for the user."""

    outputs: tuple[Output, ...]
    alignment: int
    joined: int = 0  # tensors made of one tensor for each expert
    notes: tuple[str, ...] = field(default=())

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(output.n_bytes for output in self.outputs)

    @property
    def weights(self) -> list[tuple[Weight, int]]:
        """Weights of all files, in order, with offsets in their files."""
        return [placed for output in self.outputs for placed in output.weights]

    def describe(self) -> str:
        """Describe the files in a few lines of text."""
        placed = self.weights
        experts = [(weight, at) for weight, at in placed if weight.layer is not None]
        n_bytes = sum(weight.n_bytes for weight, _ in experts)
        resident = sum(weight.n_bytes for weight, _ in placed) - n_bytes
        n_files = len(self.outputs)
        files = f"in {n_files} files, the last {self.outputs[-1].path.name}" if n_files > 1 else "in 1 file"
        lines = [
            f"{self.outputs[0].path}: {mib(self.n_bytes)} {files}",
            f"resident        {mib(resident):>14}, {len(placed) - len(experts)} tensors, in front",
        ]
        if not experts:
            lines.append("dense model: no experts, only the alignment changes")
        else:
            layers = len({weight.layer for weight, _ in experts})
            joined = f", {self.joined} of them joined from one tensor per expert" if self.joined else ""
            what = f"{len(experts)} tensors of {layers} layers{joined}"
            lines.append(f"experts         {mib(n_bytes):>14}, {what}")
            lines += _direct_lines(experts)
        lines.append(f"alignment       {self.alignment} bytes")
        return "\n".join([*lines, *self.notes])


def _direct_lines(experts: Sequence[tuple[Weight, int]]) -> list[str]:
    """Lines on how many experts' matrices begin and end where direct reads can, and why the others do not."""
    total = aligned = 0
    others: dict[int, int] = {}
    for weight, at in experts:
        each = weight.n_bytes // weight.n_expert
        total += weight.n_expert
        if at % PAGE == 0 and each % PAGE == 0:
            aligned += weight.n_expert
        else:
            others[each] = others.get(each, 0) + weight.n_expert
    lines = [f"direct reads    {aligned} of {total} expert matrices are whole pages of {PAGE} bytes"]
    for each, count in sorted(others.items()):
        if each % SECTOR:
            why = f"not a multiple of a sector of {SECTOR}: read with the edges of their neighbours"
        elif each % PAGE:
            why = f"not a multiple of a page, but of {SECTOR}: read alone if the disk has such sectors"
        else:
            why = "whole pages, but do not begin at a page boundary"
        lines.append(f"                {count} are {each} bytes: {why}")
    return lines


# ---- metadata ----------------------------------------------------------------------------------------


def metadata_of(
    headers: Sequence[GGUFHeader], alignment: int, changes: Mapping[str, bytes | None]
) -> tuple[dict[str, bytes], list[str]]:
    """Encode the fields of the result, except those of shards; return them with notes on fields left out.

    Parameters
    ----------
    changes : mapping
        Encoded fields that replace the source's or are new; None drops a field.
    """
    fields = {key: raw for key, raw in raw_fields(headers[0]).items() if not key.startswith("split.")}
    fields.pop("general.alignment", None)
    fields["general.alignment"] = encode("general.alignment", alignment)
    for key, raw in changes.items():
        fields.pop(key, None)
        if raw is not None:
            fields[key] = raw
    extra = sorted(
        {f.key for header in headers[1:] for f in header.fields if not f.key.startswith("split.")}
        - set(fields)
    )
    notes = []
    if extra:
        notes.append(
            f"left out: {', '.join(extra[:5])} of shards after the first, which llama.cpp ignores too"
        )
    return fields, notes


# ---- files -------------------------------------------------------------------------------------------


def shard_paths(path: Path, n_split: int) -> list[Path]:
    """Paths of shards as llama.cpp looks for them; `path` may be the plain name or that of a shard."""
    match = SHARD.fullmatch(path.name)
    if n_split == 1:
        return [path]
    stem = match[1] if match else path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i:05d}-of-{n_split:05d}.gguf") for i in range(1, n_split + 1)]


def check_alignment(alignment: int) -> None:
    """Raise a RotaryError for an alignment that llama.cpp does not accept."""
    if alignment < 32 or alignment & (alignment - 1) or alignment > 1 << 30:
        raise RotaryError(
            f"alignment: {alignment} bytes; llama.cpp takes powers of two, and its kernels want 32 or more; "
            f"give {PAGE}"
        )


def lay_out(
    headers: Sequence[GGUFHeader],
    path: Path,
    *,
    alignment: int = PAGE,
    split_bytes: int | None = None,
    changes: Mapping[str, bytes | None] | None = None,
    described_by: Sequence[GGUFHeader] | None = None,
) -> Layout:
    """Plan the files of a converted model.

    Parameters
    ----------
    headers : sequence of GGUFHeader
        Headers of the sources, the first shard first.
    alignment : int
        Alignment of every tensor in bytes, a power of two, at least 32.
    split_bytes : int, optional
        Maximum bytes of a file, unless a single tensor has more.
    changes : mapping, optional
        Encoded fields to replace or add; None drops a field.
    described_by : sequence of GGUFHeader, optional
        Headers whose metadata the result gets; by default `headers`.

    Raises
    ------
    ModelError
        The sources are inconsistent.
    RotaryError
        The alignment is not possible, or the result would have too many shards.
    """
    check_alignment(alignment)
    weights = weights_of(headers)
    fields, notes = metadata_of(described_by or headers, alignment, changes or {})
    joined = sum(len(weight.pieces) > 1 for weight in weights)
    groups = [weights] if split_bytes is None else _shards(weights, fields, alignment, split_bytes)
    if len(groups) > _MAX_SHARDS:
        raise RotaryError(
            f"split size: {split_bytes} bytes make {len(groups)} shards; at most {_MAX_SHARDS}; raise it"
        )
    paths = shard_paths(path, len(groups))
    outputs = []
    for number, (file, group) in enumerate(zip(paths, groups, strict=True)):
        mine = _shard_fields(fields, alignment, number, len(groups), len(weights))
        outputs.append(_output(file, group, mine, alignment))
    notes += [
        f"{output.path.name} has {output.n_bytes} bytes, more than asked for: one tensor is that large"
        for output in outputs
        if split_bytes is not None and output.n_bytes > split_bytes
    ]
    return Layout(tuple(outputs), alignment, joined, tuple(notes))


def _shard_fields(
    fields: Mapping[str, bytes], alignment: int, number: int, n_split: int, n_tensors: int
) -> list[bytes]:
    if n_split == 1:
        return list(fields.values())
    # llama.cpp reads each shard as a separate file, and assumes 32 if a shard has no alignment key.
    mine = list(fields.values()) if number == 0 else [encode("general.alignment", alignment)]
    return [
        *mine,
        encode("split.no", number, "H"),
        encode("split.count", n_split, "H"),
        encode("split.tensors.count", n_tensors, "i"),
    ]


def _shards(
    weights: Sequence[Weight], fields: Mapping[str, bytes], alignment: int, split_bytes: int
) -> list[list[Weight]]:
    groups: list[list[Weight]] = [[]]
    header = 24 + sum(map(len, _shard_fields(fields, alignment, 0, 2, 0)))
    data = 0
    for weight in weights:
        entry, padded = len(_entry(weight, 0)), _up(weight.n_bytes, alignment)
        if groups[-1] and _up(header + entry, alignment) + data + padded > split_bytes:
            groups.append([])
            header = 24 + sum(map(len, _shard_fields(fields, alignment, 1, 2, 0)))
            data = 0
        groups[-1].append(weight)
        header += entry
        data += padded
    return groups


def _up(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _entry(weight: Weight, offset: int) -> bytes:
    dims = weight.shape
    return text_bytes(weight.name) + struct.pack(
        f"<I{len(dims)}QIQ", len(dims), *dims, weight.type_number, offset
    )


def _output(path: Path, weights: Iterable[Weight], fields: Sequence[bytes], alignment: int) -> Output:
    entries, relative = [], []
    end = 0
    for weight in weights:
        entries.append(_entry(weight, end))
        relative.append((weight, end))
        end += _up(weight.n_bytes, alignment)
    header = b"".join([b"GGUF", struct.pack("<IQQ", 3, len(entries), len(fields)), *fields, *entries])
    header += bytes(_up(len(header), alignment) - len(header))
    placed = tuple((weight, len(header) + at) for weight, at in relative)
    return Output(path, header, placed, len(header) + end)
