# SPDX-License-Identifier: MIT
"""Comparisons, legacy models and injected failures for tests of conversions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

from rotary_llamacpp.gguf_files.fields import raw_fields
from rotary_llamacpp.gguf_files.header import GGUFHeader, read_header
from tests.support import write_all

MIB = 1 << 20
SHAPE = {"layers": 2, "embd": 256, "ff": 256, "experts": 8, "used": 2}


def tensor_bytes(headers: list[GGUFHeader]) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Shape, type and data of every tensor of a model."""
    found = {}
    for header in headers:
        data = header.path.read_bytes()
        for t in header.tensors:
            found[t.name] = (t.shape, t.type_name, data[t.offset : t.offset + t.n_bytes])
    return found


def fields_of(path: Path) -> dict[str, bytes]:
    """Encoded metadata, without fields that depend on the conversion or file."""
    ours = ("split.", "general.alignment", "rotary.convert.")
    return {key: raw for key, raw in raw_fields(read_header(path)).items() if not key.startswith(ours)}


def assert_nothing_else(folder: Path, *expected: Path) -> None:
    assert sorted(folder.iterdir()) == sorted(expected)


def write_legacy(model: Path, path: Path) -> None:
    """Write a model with one tensor for each expert, as Mixtral's files had until April 2024.

    The experts are neither in order nor next to each other.
    """
    reader = GGUFReader(model)
    writer = GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
    singles = []
    for tensor in reader.tensors:
        if match := re.fullmatch(r"(blk\.\d+\.ffn_\w+)_exps\.weight", tensor.name):
            singles += [(f"{match[1]}.{e}.weight", tensor.data[e], tensor) for e in range(len(tensor.data))]
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data, tensor in reversed(singles):
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    write_all(writer)


def at_call(number: int, function: Callable[..., Any], fault: BaseException) -> Callable[..., Any]:
    """Wrap `function` so that its `number`th call raises `fault`."""
    calls = iter(range(1, 1 << 30))

    def faulty(*args: Any) -> Any:
        if next(calls) == number:
            raise fault
        return function(*args)

    return faulty
