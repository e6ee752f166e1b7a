# SPDX-License-Identifier: MIT
"""Headers of well-known models by name, for planning without a file: dimensions, tensors, quantisation.

A shape becomes a `GGUFHeader` like a file's, so everything that reads headers reads shapes too. Tensors are
those that the pinned llama.cpp loads for the architecture (its ``src/models``), dimensions those that its
converter writes from the models' configurations. Norms and biases that are too small to matter are left out.
Types are what ``llama-quantize`` chooses for the name (its ``src/llama-quant.cpp``): one for all matrices,
but Q6_K for the output, and for ``q4_k_m`` more bits in some layers; ``mxfp4`` is for experts alone, the
rest is Q8_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import ModelError
from ..gguf_files.header import GGUFHeader, TensorInfo

_SIZES = {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}
_MATRICES = {
    "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k": "Q5_K", "q4_k": "Q4_K",
    "q4_k_m": "Q4_K", "q4_0": "Q4_0", "mxfp4": "Q8_0",
}  # fmt: skip
TYPES = tuple(_MATRICES)
# Types that llama-quantize falls back to where a row is not whole blocks of 256.
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Shape:
    """Dimensions in llama.cpp's words; `arch` is the architecture, `type` the usual quantisation."""

    arch: str
    layers: int
    embd: int
    heads: int
    heads_kv: int
    head_dim: int
    ff: int  # of an expert
    experts: int
    used: int
    vocab: int
    ctx: int
    type: str = "q4_k_m"
    dense: int = 0  # leading layers without experts
    dense_ff: int = 0
    shared: int = 0  # experts that every token uses
    window: int = 0  # of attention in every other layer
    biases: bool = False
    # Latent attention (MLA): ranks, and dimensions of a head with and without position and of a value.
    q_lora: int = 0
    kv_lora: int = 0
    rope: int = 0
    nope: int = 0
    head_v: int = 0


# Sources: mixtral, qwen3 and gpt-oss: llama.cpp loads what models/synth.py writes of these shapes. deepseek2:
# llama.cpp's src/models/deepseek2.cpp and the configuration that the model is published with, without its
# layer for predicting several tokens.
SHAPES = {
    "mixtral-8x7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 8, 2, 32000, 32768),
    "mixtral-8x22b": Shape("llama", 56, 6144, 48, 8, 128, 16384, 8, 2, 32768, 65536),
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 128, 8, 151936, 40960),
    "qwen3-235b-a22b": Shape("qwen3moe", 94, 4096, 64, 4, 128, 1536, 128, 8, 151936, 40960),
    "gpt-oss-20b": Shape(
        "gpt-oss", 24, 2880, 64, 8, 64, 2880, 32, 4, 201088, 131072, "mxfp4", window=128, biases=True
    ),
    "gpt-oss-120b": Shape(
        "gpt-oss", 36, 2880, 64, 8, 64, 2880, 128, 4, 201088, 131072, "mxfp4", window=128, biases=True
    ),
    "deepseek-v3": Shape(
        "deepseek2", 61, 7168, 128, 1, 576, 2048, 256, 8, 129280, 163840, dense=3, dense_ff=18432, shared=1,
        q_lora=1536, kv_lora=512, rope=64, nope=128, head_v=128,
    ),
}  # fmt: skip


def header(name: str, type_name: str | None = None) -> GGUFHeader:
    """Make the header of a named model, quantised as `type_name` or as it is usually downloaded.

    Raises
    ------
    ModelError
        The name or the type is not known.
    """
    name = name.lower()
    shape = SHAPES.get(name)
    if shape is None:
        raise ModelError(f"{name}: neither a file nor a known shape; shapes are {', '.join(SHAPES)}")
    kind = (type_name or shape.type).lower()
    if kind not in TYPES:
        raise ModelError(f"{name}: type {kind!r} is not known; choose one of {', '.join(TYPES)}")
    tensors: list[TensorInfo] = []
    at = 0
    for tensor, tensor_type, *dims in _tensors(shape, kind):
        if dims[0] % _SIZES[tensor_type][0]:
            tensor_type = _NARROWER[tensor_type]
        block, block_bytes = _SIZES[tensor_type]
        n_bytes = block_bytes
        for extent in (dims[0] // block, *dims[1:]):
            n_bytes *= extent
        number = int(GGMLQuantizationType[tensor_type])
        tensors.append(TensorInfo(tensor, tuple(dims), tensor_type, at, n_bytes, number))
        at += n_bytes
    return GGUFHeader(Path(f"{name}-{kind}.gguf"), at, _metadata(name, shape), tuple(tensors), (), 32)


def _metadata(name: str, shape: Shape) -> dict[str, Any]:
    keys = {
        "block_count": shape.layers, "context_length": shape.ctx, "embedding_length": shape.embd,
        "attention.head_count": shape.heads, "attention.head_count_kv": shape.heads_kv,
        "attention.key_length": shape.head_dim, "attention.value_length": shape.kv_lora or shape.head_dim,
        "expert_count": shape.experts, "expert_used_count": shape.used,
    }  # fmt: skip
    if shape.window:
        keys["attention.sliding_window"] = shape.window
    if shape.kv_lora:
        keys["attention.key_length_mla"] = shape.nope + shape.rope
        keys["attention.value_length_mla"] = shape.head_v
    return {
        "general.architecture": shape.arch, "general.name": name,
        **{f"{shape.arch}.{key}": value for key, value in keys.items()},
    }  # fmt: skip


def _tensors(shape: Shape, kind: str) -> Iterator[tuple[Any, ...]]:
    """Yield (name, type, *dimensions in ggml's order)."""
    matrix = _MATRICES[kind]
    output = matrix if matrix in ("F16", "BF16", "Q8_0") else "Q6_K"
    yield "token_embd.weight", matrix, shape.embd, shape.vocab
    yield "output.weight", output, shape.embd, shape.vocab
    yield "output_norm.weight", "F32", shape.embd
    for il in range(shape.layers):
        more = kind == "q4_k_m" and _more_bits(il, shape.layers)
        blk = f"blk.{il}."
        yield blk + "attn_norm.weight", "F32", shape.embd
        yield blk + "ffn_norm.weight", "F32", shape.embd
        yield from (
            _latent_attention(shape, blk, matrix)
            if shape.kv_lora
            else _attention(shape, blk, matrix, kind, more)
        )
        yield from _feed_forward(shape, blk, il, matrix, kind, more)


def _attention(shape: Shape, blk: str, matrix: str, kind: str, more: bool) -> Iterator[tuple[Any, ...]]:
    embd, wide, narrow = shape.embd, shape.heads * shape.head_dim, shape.heads_kv * shape.head_dim
    # With eight experts, llama-quantize spends more bits on keys and values, which are small beside them.
    few = shape.experts == 8 and kind.startswith("q4_k")
    value = "Q8_0" if few else "Q6_K" if more else matrix
    yield blk + "attn_q.weight", matrix, embd, wide
    yield blk + "attn_k.weight", "Q8_0" if few else matrix, embd, narrow
    yield blk + "attn_v.weight", value, embd, narrow
    yield blk + "attn_output.weight", "Q5_K" if few else matrix, wide, embd
    if shape.biases:
        for which, extent in (("q", wide), ("k", narrow), ("v", narrow), ("output", embd)):
            yield f"{blk}attn_{which}.bias", "F32", extent


def _latent_attention(shape: Shape, blk: str, matrix: str) -> Iterator[tuple[Any, ...]]:
    yield blk + "attn_q_a.weight", matrix, shape.embd, shape.q_lora
    yield blk + "attn_q_b.weight", matrix, shape.q_lora, shape.heads * (shape.nope + shape.rope)
    yield blk + "attn_kv_a_mqa.weight", matrix, shape.embd, shape.kv_lora + shape.rope
    yield blk + "attn_k_b.weight", matrix, shape.nope, shape.kv_lora, shape.heads
    yield blk + "attn_v_b.weight", matrix, shape.kv_lora, shape.head_v, shape.heads
    yield blk + "attn_output.weight", matrix, shape.heads * shape.head_v, shape.embd


def _feed_forward(
    shape: Shape, blk: str, il: int, matrix: str, kind: str, more: bool
) -> Iterator[tuple[Any, ...]]:
    embd, ff = shape.embd, shape.ff
    if il < shape.dense:
        for which, *dims in _gated(embd, shape.dense_ff):
            yield f"{blk}ffn_{which}.weight", "Q6_K" if more and which == "down" else matrix, *dims
        return
    expert = "MXFP4" if kind == "mxfp4" else matrix
    yield blk + "ffn_gate_inp.weight", "F32", embd, shape.experts
    for which, *dims in _gated(embd, ff):
        expert_type = "Q6_K" if more and which == "down" else expert
        yield f"{blk}ffn_{which}_exps.weight", expert_type, *dims, shape.experts
        if shape.biases:
            yield f"{blk}ffn_{which}_exps.bias", "F32", dims[1], shape.experts
        if shape.shared:
            shared_type = "Q6_K" if more and which == "down" else matrix
            widened = [extent * shape.shared if extent == ff else extent for extent in dims]
            yield f"{blk}ffn_{which}_shexp.weight", shared_type, *widened


def _gated(embd: int, ff: int) -> tuple[tuple[str, int, int], ...]:
    return ("gate", embd, ff), ("up", embd, ff), ("down", ff, embd)


def _more_bits(il: int, n_layer: int) -> bool:
    """Whether Q4_K_M spends more bits on a layer: use_more_bits() of llama.cpp's src/llama-quant.cpp."""
    return il < n_layer // 8 or il >= 7 * n_layer // 8 or (il - n_layer // 8) % 3 == 2
