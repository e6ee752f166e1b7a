# SPDX-License-Identifier: MIT
"""Metadata fields of GGUF files as raw bytes, and encoders for the few kinds that this package writes."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

from gguf.constants import GGUFValueType

from .header import GGUFHeader

_INTEGERS = {"H": GGUFValueType.UINT16, "I": GGUFValueType.UINT32, "i": GGUFValueType.INT32}


def text_bytes(value: str) -> bytes:
    """Encode a text as its length and its UTF-8."""
    encoded = value.encode(errors="backslashreplace")  # the name of a file may not be valid text
    return struct.pack("<Q", len(encoded)) + encoded


def encode(key: str, value: int | str | bytes | Sequence[str], kind: str = "I") -> bytes:
    """Encode a key and its value.

    An int becomes an integer of struct's `kind`, H, i or I; a str a string; bytes an array of bytes; a
    sequence an array of strings.
    """
    name = text_bytes(key)
    if isinstance(value, int):
        return name + struct.pack("<I" + kind, _INTEGERS[kind], value)
    if isinstance(value, str):
        return name + struct.pack("<I", GGUFValueType.STRING) + text_bytes(value)
    if isinstance(value, bytes):
        return name + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, len(value)) + value
    return (
        name
        + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value))
        + b"".join(map(text_bytes, value))
    )


def raw_fields(header: GGUFHeader, keys: Collection[str] | None = None) -> dict[str, bytes]:
    """Read the encoded fields of a file, by key; only those of `keys` if given."""
    with open(header.path, "rb") as file:
        found = {}
        for entry in header.fields:
            if keys is not None and entry.key not in keys:
                continue
            file.seek(entry.start)
            found[entry.key] = file.read(entry.end - entry.start)
        return found


def array_bytes(raw: bytes, key: str) -> bytes | None:
    """Decode a field that `encode` made of bytes; None if it has another type."""
    at = len(text_bytes(key))
    if raw[at : at + 8] != struct.pack("<II", GGUFValueType.ARRAY, GGUFValueType.UINT8):
        return None
    return raw[at + 16 :]


def array_strings(raw: bytes, key: str) -> list[str]:
    """Decode a field that `encode` made of strings; empty if it has another type."""
    at = len(text_bytes(key))
    if raw[at : at + 8] != struct.pack("<II", GGUFValueType.ARRAY, GGUFValueType.STRING):
        return []
    found = []
    at += 16
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        found.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return found
