# SPDX-License-Identifier: MIT
"""Memory and operations that a model needs, from GGUF headers. Pure: reads no file.

Keys are those of llama.cpp's src/llama-arch.cpp; src/llama-kv-cache*.cpp applies them to the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..gguf_files.header import GGUFHeader, TensorInfo
from ..gguf_files.info import LayerInfo, ModelInfo, loaded
from ..gguf_files.layout import SECTOR

# MoE architectures whose files give the width of the window, but not the layers that have one. One layer of n
# has none: the last in _PATTERNS, the first in _FULL_FIRST. Source: load_swa_pattern() of llama.cpp.
_PATTERNS = {"gpt-oss": 2, "llama4": 4, "afmoe": 4, "exaone-moe": 4, "mellum": 4}
_FULL_FIRST = {"smallthinker": 4, "laguna": 4, "cohere2moe": 4}
_VALUE_BYTES = 2  # f16
_MAX_LAYERS = 4096  # more means a damaged header; checked before anything is sized by it


@dataclass(frozen=True)
class CachedLayer:
    """One layer's part of the KV cache: `width` values per token, of at most `window` tokens (0: all)."""

    width: int
    window: int


@dataclass(frozen=True)
class Heads:
    """Attention heads: number of heads, number of key/value heads, and sizes of a key and a value."""

    n_head: int = 1
    n_head_kv: int = 1
    n_key: int = 0
    n_value: int = 0


@dataclass(frozen=True)
class Matrix:
    """One matrix: ggml's name of the type, length of a row, number of rows, and bytes."""

    type_name: str
    n_in: int
    n_out: int
    n_bytes: int


@dataclass(frozen=True)
class Footprint:
    """Sizes and operations of a model.

    Attributes
    ----------
    resident_bytes : int
        Weights that are not experts.
    token_bytes : int
        Part of `resident_bytes` that a token reads: all but embeddings that are not the output matrix too.
    token_flops, expert_flops : float
        Operations of one token in weights that are not experts, and in the experts it chooses.
    output_flops : float
        Operations of the output matrix, part of `token_flops`; a prompt needs them for the last token only.
    layers : tuple of LayerInfo
        Layers with experts.
    matrices : tuple of Matrix
        Matrices of an expert in the first layer that has experts.
    dense : Matrix
        Largest matrix that is not an expert's, of the type with the most bytes.
    heads : Heads
        Heads of the first layer with attention.
    """

    name: str
    architecture: str
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_params: int
    file_bytes: int
    resident_bytes: int
    token_bytes: int
    token_flops: float
    expert_flops: float
    output_flops: float
    layers: tuple[LayerInfo, ...]
    matrices: tuple[Matrix, ...]
    dense: Matrix
    cached: tuple[CachedLayer, ...]
    heads: Heads = Heads()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.layer_bytes for layer in self.layers)

    @property
    def chosen_bytes(self) -> int:
        """Bytes of the experts that one token chooses, which is also the smallest budget."""
        return sum(layer.chosen_bytes for layer in self.layers)

    @property
    def whole_sectors(self) -> bool:
        """Whether experts can be read directly without their neighbours' edges."""
        return all(matrix.n_bytes % SECTOR == 0 for matrix in self.matrices)

    def attention_flops(self, depth: int) -> float:
        """Operations of one token's attention over `depth` others."""
        values = self.heads.n_head * (self.heads.n_key + self.heads.n_value)
        return sum(2.0 * values * min(depth, layer.window or depth) for layer in self.cached)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.resident_bytes + self.expert_bytes

    def kv_bytes(self, n_ctx: int, windows: bool = True, n_ubatch: int = 512) -> int:
        """Bytes of the KV cache in f16 for a context of `n_ctx` tokens.

        Parameters
        ----------
        windows : bool
            Layers with a window keep only that and a micro-batch, in steps of 256 tokens, as llama.cpp's
            programs do. The library, and so llama-cpp-python, keeps the whole context by default.
        """
        values = 0
        for layer in self.cached:
            cells = n_ctx
            if layer.window and windows:
                cells = -(-min(n_ctx, layer.window + n_ubatch) // 256) * 256
            values += cells * layer.width
        return _VALUE_BYTES * values

    def kv_read_bytes(self, depth: int) -> int:
        """Bytes of the KV cache that one token reads after `depth` others."""
        return _VALUE_BYTES * sum(min(depth, layer.window or depth) * layer.width for layer in self.cached)


def of_headers(headers: Sequence[GGUFHeader]) -> Footprint:
    """Compute the footprint of a model from the headers of all files.

    Raises
    ------
    ModelError
        The header is inconsistent, or lacks numbers that size the KV cache.
    """
    info, metadata = ModelInfo.of(headers), headers[0].metadata
    keys = _Keys(info.path.name, info.architecture, metadata)
    if not 0 < info.n_layer <= _MAX_LAYERS:
        raise ModelError(
            f"{info.path.name}: {info.n_layer} layers; 1 to {_MAX_LAYERS} are possible; download it again"
        )
    tensors = loaded(headers)[1]
    names = {tensor.name for tensor in tensors}
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    looked_up = embedding is not None and "output.weight" in names
    elements = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    n_params = sum(elements.values())
    stored = sum(count for name, count in elements.items() if _is_expert(name))
    of_embedding = elements["token_embd.weight"] if looked_up else 0
    output = elements.get("output.weight", elements.get("token_embd.weight", 0))
    chosen = 0.0
    for layer in info.layers:
        of_layer = sum(
            elements[name]
            for part in ("gate", "up", "down", "gate_up")
            if (name := f"blk.{layer.il}.ffn_{part}_{layer.kind}.weight") in elements
        )
        chosen += of_layer * layer.n_expert_used / layer.n_expert
    first = f"blk.{info.layers[0].il}." if info.layers else ""
    experts = [tensor for tensor in tensors if _is_expert(tensor.name) and len(tensor.shape) == 3]
    return Footprint(
        name=info.path.name,
        architecture=info.architecture,
        n_layer=info.n_layer,
        n_embd=keys.number("embedding_length"),
        n_vocab=embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else 0,
        n_ctx_train=info.n_ctx_train,
        n_params=n_params,
        file_bytes=info.file_bytes,
        resident_bytes=info.resident_bytes,
        token_bytes=info.resident_bytes - (embedding.n_bytes if looked_up and embedding is not None else 0),
        token_flops=2.0 * (n_params - stored - of_embedding),
        expert_flops=2.0 * chosen,
        output_flops=2.0 * output,
        layers=info.layers,
        matrices=tuple(_matrix(tensor) for tensor in experts if tensor.name.startswith(first)),
        dense=_dense(tensors, looked_up),
        cached=_cached(keys, info.n_layer),
        heads=_heads(keys, info.n_layer),
    )


def _matrix(tensor: TensorInfo) -> Matrix:
    n_in, n_out, n_expert = (*tensor.shape, 1, 1)[:3]
    return Matrix(tensor.type_name, n_in, n_out, tensor.n_bytes // max(n_expert, 1))


def _dense(tensors: Sequence[TensorInfo], looked_up: bool) -> Matrix:
    by_type: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        if not _is_expert(tensor.name) and not (looked_up and tensor.name == "token_embd.weight"):
            by_type.setdefault(tensor.type_name, []).append(tensor)
    main = max(by_type.values(), key=lambda group: sum(tensor.n_bytes for tensor in group), default=[])
    return _matrix(max(main, key=lambda tensor: tensor.n_bytes)) if main else Matrix("F32", 1, 1, 4)


def _is_expert(name: str) -> bool:
    return name.endswith(("_exps.weight", "_chexps.weight"))


def _heads(keys: _Keys, n_layer: int) -> Heads:
    heads = keys.each("attention.head_count", n_layer)
    heads_kv = keys.each("attention.head_count_kv", n_layer, heads)
    head = keys.number("embedding_length") // max(heads[0], 1)
    key, value = keys.number("attention.key_length", head), keys.number("attention.value_length", head)
    il = next((i for i in range(n_layer) if heads[i] and heads_kv[i]), 0)  # others are recurrent
    return Heads(heads[il], heads_kv[il], key, value)


def _cached(keys: _Keys, n_layer: int) -> tuple[CachedLayer, ...]:
    heads_kv = keys.each("attention.head_count_kv", n_layer, keys.each("attention.head_count", n_layer))
    first = _heads(keys, n_layer)
    key, value = first.n_key, first.n_value
    if keys.number("attention.key_length_mla", 0):
        value = 0  # latent attention keeps one vector, from which keys and values are computed
    narrow = (
        keys.number("attention.key_length_swa", key),
        keys.number("attention.value_length_swa", value),
    )
    window = keys.number("attention.sliding_window", 0)
    windowed = keys.windowed(n_layer) if window else [False] * n_layer
    interval = keys.number("full_attention_interval", 0)  # the layers between are recurrent, without KV cache
    layers = []
    for il in range(n_layer):
        if interval and (il + 1) % interval:
            continue
        width = heads_kv[il] * (sum(narrow) if windowed[il] else key + value)
        layers.append(CachedLayer(width, window if windowed[il] else 0))
    return tuple(layers)


class _Keys:
    """Reads numbers of the model's architecture from the metadata."""

    def __init__(self, name: str, arch: str, metadata: dict[str, Any]) -> None:
        self.name, self.arch, self.metadata = name, arch, metadata

    def number(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
            raise self.wrong(key, value)
        return value

    def each(self, key: str, n_layer: int, default: list[int] | None = None) -> list[int]:
        """One number for each layer, from an array or from one number for all."""
        value = self.metadata.get(f"{self.arch}.{key}")
        if value is None and default is not None:
            return default
        if isinstance(value, list) and len(value) >= n_layer and all(isinstance(n, int) for n in value):
            return value[:n_layer]
        return [self.number(key)] * n_layer

    def windowed(self, n_layer: int) -> list[bool]:
        """Which layers have a window; none if the file does not say, which makes the cache look larger."""
        pattern = self.metadata.get(f"{self.arch}.attention.sliding_window_pattern")
        if isinstance(pattern, list) and len(pattern) >= n_layer:
            return [bool(each) for each in pattern[:n_layer]]
        every = _FULL_FIRST.get(self.arch, _PATTERNS.get(self.arch, 0))
        every = pattern if isinstance(pattern, int) else every
        full = 0 if self.arch in _FULL_FIRST else every - 1
        return [bool(every) and il % every != full for il in range(n_layer)]

    def wrong(self, key: str, value: object) -> ModelError:
        what = "is missing" if value is None else f"is {str(value)[:40]}"
        return ModelError(
            f"{self.name}: {self.arch}.{key} {what}; a number is needed to size the KV cache; "
            "convert the model again"
        )
