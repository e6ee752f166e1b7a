# SPDX-License-Identifier: MIT
"""Damage to bytes, texts and GGUF headers, drawn from a `random.Random`, so that a seed repeats it."""

from __future__ import annotations

import struct
from random import Random

from rotary_llamacpp.gguf_files.fields import raw_fields, text_bytes
from rotary_llamacpp.gguf_files.header import GGUFHeader

# Values at which counts, sizes and offsets are likely to go wrong.
NUMBERS = (
    0, 1, 2, 3, 7, 31, 32, 63, 64, 127, 128, 255, 256, 4095, 4096, 4097, 65535, 65536, 1 << 20, 1 << 24,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 48, 1 << 60, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1,
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, -1e30, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "\n", "\r", "\t", "\x00", "\x1b[31m", "\u2028", "\x85", "\u0663", "\u00b2", "\u212a", "\ufffd",
    "%", "%s", "%n", "%%", "-", "+", ".", ",", ";", "=", ":", "/", "..", "'", '"', "\\", "{}", "[", "0", "00",
    "1", "0x10", "1e5", "1e400", "9" * 20, "9" * 400, "9" * 5000, "0." + "0" * 300 + "1", "nan", "inf",
    "auto", "min", "off", "none", "b", "B", "K", "KiB", "mib", "GiB", "TB", "GB/s", "slots", " slot",
    "pcie4x16", "true", "null", "blk.0.", "x" * 1000,
)  # fmt: skip


def number(rng: Random) -> int:
    """A number below 2^64 that readers are likely to get wrong."""
    if rng.random() < 0.3:
        return rng.getrandbits(rng.choice((4, 8, 16, 32, 64)))
    return (rng.choice(NUMBERS) + rng.choice((0, 0, 0, -1, 1))) % (1 << 64)


def text(rng: Random, words: tuple[str, ...] = TEXTS) -> str:
    """One to four of the words, joined."""
    return "".join(rng.choice(words) for _ in range(rng.randint(1, 4)))


def spoiled_text(rng: Random, good: str) -> str:
    """A text with a few places changed."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(good))
        end = min(len(good), at + rng.randint(0, 4))
        what = rng.random()
        if what < 0.4:
            good = good[:at] + rng.choice(TEXTS) + good[end:]
        elif what < 0.6:
            good = good[:at] + good[end:]
        elif what < 0.8:
            good = good[:at] + good[at:end] * 2 + good[end:]
        else:
            good = good[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) + good[end:]
    return good


def spoiled(rng: Random, data: bytes) -> bytes:
    """Bytes with a few places changed."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(9)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif what in (2, 3):
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (number(rng) % (1 << 8 * width)).to_bytes(width, "little")
        elif what == 4:
            del out[at:]
        elif what == 5:
            del out[at : at + rng.randint(1, 64)]
        elif what == 6:
            out[at:at] = rng.randbytes(rng.randint(1, 64))
        elif what == 7:
            begin = rng.randrange(len(out) + 1)
            out[at:at] = out[begin : begin + rng.randint(1, 256)]
        else:
            n = rng.randint(1, 64)
            out[at : at + n] = rng.choice((b"\x00", b"\xff")) * n
    return bytes(out)


class Header:
    """A parsed GGUF header, to be encoded again with damage."""

    def __init__(self, header: GGUFHeader) -> None:
        self.fields = list(raw_fields(header).items())
        start = min((tensor.offset for tensor in header.tensors), default=0)
        self.tensors = [
            (tensor.name, tensor.shape, tensor.type_number, tensor.offset - start)
            for tensor in header.tensors
        ]
        self.alignment = header.alignment
        self.data_bytes = header.n_bytes - start

    def encoded(self, rng: Random) -> bytes:
        """Encode with wrong values, types, dimensions, offsets or names, with damaged bytes, or with both."""
        fields, tensors = list(self.fields), list(self.tensors)
        n_fields, n_tensors = 0, 0  # added to the counts in the header
        how = rng.random()
        if how < 0.75:
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                self._wrong_meaning(rng, fields, tensors)
            if rng.random() < 0.05:
                n_fields, n_tensors = rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))
        raw = b"GGUF" + struct.pack(
            "<IQQ",
            rng.choice((3, 3, 3, 3, 2)),
            max(0, len(tensors) + n_tensors),
            max(0, len(fields) + n_fields),
        )
        raw += b"".join(field for _, field in fields)
        for name, shape, kind, offset in tensors:
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            raw += text_bytes(name) + dims + struct.pack("<IQ", kind, offset)
        raw += bytes(-len(raw) % self.alignment)
        return spoiled(rng, raw) if how > 0.6 else raw

    @staticmethod
    def _wrong_meaning(rng: Random, fields: list, tensors: list) -> None:
        what = rng.random()
        if what < 0.5 and fields:
            # Most fields are numbers with which readers compute; only a few are vocabularies.
            at = rng.randrange(len(fields))
            key, raw = fields[at]
            how = rng.random()
            if how < 0.1:
                del fields[at]
            elif how < 0.15:
                fields.insert(rng.randrange(len(fields)), fields[at])
            elif how < 0.2:
                fields[at] = (key, text_bytes(spoiled_text(rng, key)) + raw[8 + len(key.encode()) :])
            else:
                fields[at] = (key, text_bytes(key) + value(rng))
        elif tensors:
            at = rng.randrange(len(tensors))
            name, shape, kind, offset = tensors[at]
            how = rng.randrange(8)
            if how == 0:
                del tensors[at]
            elif how == 1:
                tensors.insert(rng.randrange(len(tensors)), tensors[at])
            elif how == 2:
                tensors[at] = (spoiled_text(rng, name), shape, kind, offset)
            elif how == 3:
                tensors[at] = (name, shape, rng.choice((rng.randrange(48), number(rng) % (1 << 32))), offset)
            elif how == 4:
                tensors[at] = (name, shape, kind, rng.choice((number(rng), offset + 32, tensors[-1][3])))
            else:
                dims = list(shape)
                if dims and rng.random() < 0.8:
                    dims[rng.randrange(len(dims))] = number(rng)
                else:
                    dims = [number(rng) for _ in range(rng.randint(0, 9))]
                tensors[at] = (name, tuple(dims), kind, offset)


def value(rng: Random) -> bytes:
    """Type and value of a field, encoded; the type is random."""
    kind = rng.choice((0, 1, 2, 3, 4, 4, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12))
    if kind == 8:
        return struct.pack("<I", 8) + text_bytes(text(rng))
    if kind == 9:
        n = rng.randint(0, 40)
        item = rng.choice((0, 4, 5, 6, 8, 10))
        head = struct.pack("<IIQ", 9, item, rng.choice((n, n, n, number(rng))))
        if item == 8:
            return head + b"".join(text_bytes(text(rng)) for _ in range(n))
        return head + b"".join(_scalar(rng, item) for _ in range(n))
    return struct.pack("<I", kind) + _scalar(rng, kind)


def _scalar(rng: Random, kind: int) -> bytes:
    if kind in (6, 12):
        return struct.pack("<f" if kind == 6 else "<d", rng.choice(FLOATS))
    width = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 7: 1, 10: 8, 11: 8}[kind]
    return (number(rng) % (1 << 8 * width)).to_bytes(width, "little")
