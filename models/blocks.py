# SPDX-License-Identifier: MIT
"""Weights written directly as valid GGUF blocks: random payload, chosen scale, no quantisation pass.

`Pool` is for the bulk, the experts: one random pool of blocks in memory, from which each matrix is copied
beginning at a block of its own. `dense` is for the small rest, where single columns must have chosen values.
This module knows block layouts (ggml-common.h), but neither models nor files.
"""

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q

TYPES = {
    "f32": Q.F32,
    "f16": Q.F16,
    "bf16": Q.BF16,
    "q8_0": Q.Q8_0,
    "q4_0": Q.Q4_0,
    "q4_k": Q.Q4_K,
    "q6_k": Q.Q6_K,
    "mxfp4": Q.MXFP4,
}
PAYLOAD_RMS = 73.3  # root mean square of integers uniform in -127..127
MXFP4_RMS = 5.852  # root mean square of kvalues_mxfp4


def to_bf16(values):
    """Upper halves of float32 `values`, as uint16."""
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _half(values):
    """Little-endian fp16 bytes (n, 2) uint8 of `values` (n,), none of them 0, which would erase a block."""
    halves = np.maximum(np.abs(values), 6e-8) * np.sign(values)
    return halves.astype("<f2").view(np.uint8).reshape(-1, 2)


def random_blocks(kind, n, std, rng):
    """`n` random blocks of ggml type `kind` whose values have mean about 0 and standard deviation `std`.

    Returns
    -------
    numpy.ndarray
        (n, bytes per block), uint8.
    """
    size, n_bytes = GGML_QUANT_SIZES[kind]
    # As in a real file, scales differ between blocks, by up to 25 %.
    scale = std * rng.uniform(0.75, 1.25, n)
    # q4_0 and q6_K have one code more below zero than above; signed scales keep the mean at 0.
    signed = scale * rng.choice((-1.0, 1.0), n)

    def raw(count):
        return np.frombuffer(rng.bytes(n * count), dtype=np.uint8).reshape(n, count)

    if kind in (Q.F32, Q.F16, Q.BF16):
        values = (rng.random((n, size), dtype=np.float32) - np.float32(0.5)) * np.float32(std * 12**0.5)
        if kind == Q.BF16:
            return to_bf16(values).view(np.uint8).reshape(n, n_bytes)
        return values.astype("<f4" if kind == Q.F32 else "<f2").view(np.uint8).reshape(n, n_bytes)
    if kind == Q.Q8_0:
        payload = np.maximum(raw(32).view(np.int8), -127).view(np.uint8)  # -128 is never written by ggml
        return np.concatenate((_half(scale / PAYLOAD_RMS), payload), axis=1)
    if kind == Q.Q4_0:  # d * (q - 8)
        return np.concatenate((_half(signed / 4.637), raw(16)), axis=1)
    if kind == Q.MXFP4:  # 2**(e - 128) * kvalue
        exponent = np.log2(std / MXFP4_RMS)
        low = np.floor(exponent)
        # Scales are powers of two: mix two neighbours so that the mean square is right.
        up = rng.random(n) < (4 ** (exponent - low) - 1) / 3
        e = np.clip(128 + low + up, 1, 254).astype(np.uint8)
        return np.concatenate((e[:, None], raw(16)), axis=1)
    if kind == Q.Q4_K:  # d * sc * q - dmin * m
        # Six-bit scales 32..63 with equal minima and dmin = 7.5 d centre the values. Packing as
        # get_scale_min_k4 reads it: the first four pairs whole, the others split over nibbles and top bits.
        sc = rng.integers(32, 64, (n, 8), dtype=np.uint8)
        top = (sc[:, 4:] >> 4) << 6
        low_nibbles = sc[:, 4:] & 15
        packed = np.concatenate((sc[:, :4] | top, sc[:, :4] | top, low_nibbles | low_nibbles << 4), axis=1)
        d = scale / (4.61 * 48.4)
        return np.concatenate((_half(d), _half(7.5 * d), packed, raw(128)), axis=1)
    if kind == Q.Q6_K:  # d * sc * (q - 32)
        # Small sub-scales, so that d stays a normal fp16 number.
        sc = (rng.integers(8, 16, (n, 16)) * rng.choice((-1, 1), (n, 16))).astype(np.int8).view(np.uint8)
        return np.concatenate((raw(192), sc, _half(scale / (18.5 * 11.7))), axis=1)
    raise ValueError(f"{kind.name}: no block writer; known types are {', '.join(TYPES)}; choose one of them.")


class Pool:
    """A random pool of blocks; matrix number i is read from the pool beginning at a block of its own.

    Parameters
    ----------
    kind : gguf.GGMLQuantizationType
    std : float
        Standard deviation of the values.
    n_blocks : int
        Blocks in the pool, a power of two above the number of matrices, so that all starts differ.
    seed : sequence of int
    """

    STRIDE = 0x9E3779B1  # odd: multiples of it modulo a power of two visit every start once

    def __init__(self, kind, std, n_blocks, seed):
        blocks = random_blocks(kind, n_blocks, std, np.random.default_rng(seed))
        self.block_size, self.block_bytes = GGML_QUANT_SIZES[kind]
        self.n_blocks = n_blocks
        self._bytes = memoryview(np.ascontiguousarray(blocks)).cast("B")

    def write(self, file, n_values, index):
        """Write `n_values` values (a multiple of the block size) as matrix number `index`."""
        left = n_values // self.block_size
        at = index * self.STRIDE % self.n_blocks
        while left:
            n = min(left, self.n_blocks - at)
            file.write(self._bytes[at * self.block_bytes : (at + n) * self.block_bytes])
            left, at = left - n, 0


def payload(rng, rows, cols):
    """Random integers in -127..127, (rows, cols) int8: the values of `dense` before scaling."""
    return np.maximum(np.frombuffer(rng.bytes(rows * cols), dtype=np.int8).reshape(rows, cols), -127)


def dense(kind, values, column_scale):
    """Rows of integers times a scale per 32 columns, as bytes of type `kind`.

    Parameters
    ----------
    kind : gguf.GGMLQuantizationType
        F32, F16, BF16 or Q8_0.
    values : numpy.ndarray
        (rows, cols) int8, -127..127.
    column_scale : numpy.ndarray
        (cols / 32,) scale of each group of 32 columns; 0 erases the group.
    """
    rows, cols = values.shape
    if kind == Q.Q8_0:
        out = np.empty((rows, cols // 32, 34), dtype=np.uint8)
        out[:, :, :2] = column_scale.astype("<f2").view(np.uint8).reshape(1, -1, 2)
        out[:, :, 2:] = values.view(np.uint8).reshape(rows, -1, 32)
        return out
    floats = values * np.repeat(column_scale, 32).astype(np.float32)
    return to_bf16(floats) if kind == Q.BF16 else floats.astype("<f4" if kind == Q.F32 else "<f2")
