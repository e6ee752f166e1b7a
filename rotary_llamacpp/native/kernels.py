# SPDX-License-Identifier: MIT
"""Times ggml's kernels: multiplications by a model's weights, the rest of a layer, and the link.

Memory bandwidth says little about decode on a CPU: unpacking quantised weights often takes longer than
reading them, and depends on the type, the instruction set and whether ggml repacks the weights. So the kernel
itself is timed, in the buffer that llama.cpp would choose. No model is loaded.
"""

from __future__ import annotations

import ctypes
import time
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import LibraryError
from ..units import MIB
from .ggml import Device, extents, strides, timed

F16, F32, I32, I64 = (GGMLQuantizationType[name] for name in ("F16", "F32", "I32", "I64"))
# Experts of more bytes than caches and TLBs cover: with 256 MiB, kernels seem a sixth faster than in a model.
_MAX_BYTES = 768 * MIB
_MATRIX_BYTES = 64 * MIB
_READ_BYTES = 192 * MIB  # read by one graph of decode
_MAX_NODES = 256  # a graph of ggml_new_graph() has room for 2048, inputs included
_MAX_LAYERS, _CACHE_BYTES = 16, 256 * MIB
_LINK_BYTES = 128 * MIB


@dataclass(frozen=True)
class KernelRates:
    """Rates of the kernels for one type of weights.

    Attributes
    ----------
    token_rate : float
        Bytes of weights per second, a token at a time.
    prompt_flops : float
        Operations per second, 512 tokens at a time.
    fill_rate : float
        Bytes per second that one thread puts into place, repacking included.
    repacked : bool
        Whether ggml repacks weights of the type on this CPU.
    """

    token_rate: float
    prompt_flops: float
    fill_rate: float
    repacked: bool


@dataclass(frozen=True)
class Matrices:
    """Weights of one shape: `n_expert` matrices of `n_out` rows of `n_in`, of which a token uses `n_used`.

    `n_stored` is their number in all layers together; 1 expert is a plain matrix, for MUL_MAT.
    """

    type_name: str
    n_in: int
    n_out: int
    n_expert: int = 1
    n_used: int = 1
    n_stored: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]
        if self.n_in % block:
            raise LibraryError(
                f"{self.type_name}: rows of {self.n_in} are not whole blocks of {block}; measure another type"
            )
        return self.n_in // block * block_bytes


@dataclass(frozen=True)
class LayerShape:
    """Extents of a layer's activations."""

    n_embd: int
    n_head: int
    n_head_kv: int
    n_key: int
    n_value: int
    n_expert: int
    n_used: int
    n_ff: int
    depth: int  # tokens in the KV cache


def measure(matrices: Matrices, threads: int, device: str = "CPU") -> KernelRates:
    """Time multiplications by matrices on a device, which is named as in ggml.

    Raises
    ------
    LibraryError
        ggml cannot compute with such matrices there.
    """
    # A plain matrix gets more rows than a cache can hold.
    n_out = (
        matrices.n_out if matrices.n_expert > 1 else max(matrices.n_out, _MATRIX_BYTES // matrices.row_bytes)
    )
    matrix_bytes = matrices.row_bytes * n_out
    n_stored = max(matrices.n_used, min(matrices.n_stored, _MAX_BYTES // matrix_bytes))
    n_expert = min(matrices.n_expert, n_stored)
    with Device(device, threads) as ggml:
        kind = int(GGMLQuantizationType[matrices.type_name])
        weights, repacked = _weights(ggml, kind, matrices.n_in, n_out, n_stored, matrices.n_used)
        # These bytes are small finite numbers in any type; random scales may be NaN, or denormal and slow.
        data = np.full(n_stored * matrix_bytes, 0x3C, np.uint8)
        start = time.perf_counter()
        ggml.set(weights, data)
        fill_rate = data.nbytes / (time.perf_counter() - start)
        n_nodes = min(max(1, _READ_BYTES // (matrices.n_used * matrix_bytes)), _MAX_NODES)
        token = _time(ggml, weights, n_stored, matrices.n_used, n_tokens=1, n_nodes=n_nodes)
        n_tokens = 512 if n_expert > 1 else 128
        prompt = _time(ggml, weights, n_expert, matrices.n_used, n_tokens, n_nodes=1)
        return KernelRates(
            n_nodes * matrices.n_used * matrix_bytes / token,
            n_tokens * matrices.n_used * 2.0 * matrices.n_in * n_out / prompt,
            fill_rate,
            repacked,
        )


def _weights(ggml: Device, kind: int, n_in: int, n_out: int, n_expert: int, n_used: int) -> tuple[Any, bool]:
    """Allocate weights, repacked if the device can; return them, and whether they are repacked."""
    lib = ggml.lib
    for buft in ggml.extra_bufts():
        context = ggml.context(8)
        weights = lib.ggml_new_tensor_3d(context, kind, n_in, n_out, n_expert)
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buft)
        if buffer:
            node = _multiplied(ggml, context, weights, n_used, 1)[0]
            if lib.ggml_backend_dev_supports_op(ggml.device, node):
                ggml.keep(context, buffer)
                return weights, True
            lib.ggml_backend_buffer_free(buffer)
        lib.ggml_free(context)
    context = ggml.context(2)
    weights = lib.ggml_new_tensor_3d(context, kind, n_in, n_out, n_expert)
    ggml.allocate(context)
    return weights, False


def _multiplied(ggml: Device, context: Any, weights: Any, n_used: int, n_tokens: int) -> tuple[Any, Any, Any]:
    """Make a product; return the product, the inputs, and the ids of experts or None."""
    lib = ggml.lib
    n_in, _, n_expert, _ = extents(weights)
    if n_expert == 1:
        inputs = lib.ggml_new_tensor_3d(context, F32, n_in, n_tokens, 1)
        return lib.ggml_mul_mat(context, weights, inputs), inputs, None
    inputs = lib.ggml_new_tensor_3d(context, F32, n_in, 1, n_tokens)
    ids = lib.ggml_new_tensor_3d(context, I32, n_used, n_tokens, 1)
    return lib.ggml_mul_mat_id(context, weights, inputs, ids), inputs, ids


def _time(ggml: Device, weights: Any, n_expert: int, n_used: int, n_tokens: int, n_nodes: int) -> float:
    """Seconds of a graph of `n_nodes` products, each with other experts among the first `n_expert`."""
    rng = np.random.default_rng(1)
    context = ggml.context(3 * n_nodes + 8)
    nodes = [_multiplied(ggml, context, weights, n_used, n_tokens) for _ in range(n_nodes)]
    graph = ggml.graph(context, [node for node, _, _ in nodes])
    ggml.allocate(context)
    order = rng.permutation(n_expert)
    for i, (_, inputs, ids) in enumerate(nodes):
        ggml.set(inputs, rng.standard_normal(extents(inputs)[0] * n_tokens).astype(np.float32))
        if ids is None:
            continue
        if n_tokens == 1:  # other experts for each, so that no cache holds them
            chosen = order[(i * n_used + np.arange(n_used)) % n_expert]
        else:
            chosen = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_tokens)])
        ggml.set(ids, np.ascontiguousarray(chosen, np.int32))
    return ggml.time(graph)


# ---- the rest of a layer


def measure_layer(shape: LayerShape, n_tokens: int, threads: int, device: str = "CPU") -> float:
    """Seconds that a layer takes for some tokens, without the multiplications by weights.

    Times norms, positions, attention over the KV cache, routing and the merging of experts' outputs, as in
    llama.cpp's build_attn_mha() and build_moe_ffn(); inputs are zeros.
    """
    with Device(device, threads) as ggml:
        cache_bytes = 2 * shape.depth * shape.n_head_kv * (shape.n_key + shape.n_value)
        n_layers = max(1, min(_MAX_LAYERS // n_tokens, _CACHE_BYTES // max(cache_bytes, 1)))
        context = ggml.context(n_layers * (48 + shape.n_used * 2) + 32)
        layer = _Layer(ggml, context, shape, n_tokens)
        nodes = [node for _ in range(n_layers) for node in layer.nodes()]
        graph = ggml.graph(context, nodes)
        ggml.allocate(context)
        return ggml.time(graph) / n_layers


class _Layer:
    """Nodes of layers; inputs stand in for the products with weights."""

    def __init__(self, ggml: Device, context: Any, shape: LayerShape, n_tokens: int) -> None:
        self.ggml, self.context, self.shape, self.n_tokens = ggml, context, shape, n_tokens
        self.hidden = self.new(F32, shape.n_embd, n_tokens)
        self.scale = self.new(F32, shape.n_embd)
        self.positions = self.new(I32, n_tokens)
        self.queries = self.new(F32, shape.n_key, shape.n_head, n_tokens)
        self.keys = self.new(F32, shape.n_key, shape.n_head_kv, n_tokens)
        self.values = self.new(F32, 1, shape.n_value * shape.n_head_kv * n_tokens)
        self.rows = self.new(I64, n_tokens)
        self.cells = self.new(I64, shape.n_value * shape.n_head_kv * n_tokens)
        self.mask = self.new(F32, shape.depth, n_tokens)
        self.gate, self.up = (self.new(F32, shape.n_ff, shape.n_used, n_tokens) for _ in range(2))
        self.down = self.new(F32, shape.n_embd, shape.n_used, n_tokens)
        self.logits = self.new(F32, shape.n_expert, n_tokens)

    def new(self, kind: int, *dims: int) -> Any:
        return self.ggml.lib.ggml_new_tensor_3d(self.context, kind, *dims, *[1] * (3 - len(dims)))

    def op(self, name: str, *arguments: Any) -> Any:
        return getattr(self.ggml.lib, f"ggml_{name}")(self.context, *arguments)

    def nodes(self) -> list[Any]:
        """Nodes of one more layer, in the order of computing."""
        normed = self.op("mul", self.op("rms_norm", self.hidden, 1e-6), self.scale)
        stored, attended = self.attention()
        self.hidden = self.op("add", self.hidden, self.hidden)
        again = self.op("mul", self.op("rms_norm", self.hidden, 1e-6), self.scale)
        made, summed = self.experts()
        self.hidden = self.op("add", self.hidden, summed)
        return [normed, *stored, attended, again, made, self.hidden]

    def attention(self) -> tuple[list[Any], Any]:
        shape, n = self.shape, self.n_tokens
        keys = self.new(F16, shape.n_key * shape.n_head_kv, shape.depth)
        # Transposed, so that every value is a row of its own.
        values = self.new(F16, 1, shape.depth * shape.n_value * shape.n_head_kv)
        n_rope = shape.n_key - shape.n_key % 2
        queries = self.op("rope", self.queries, self.positions, n_rope, 0)
        turned = self.op("rope", self.keys, self.positions, n_rope, 0)
        flat = self.op("reshape_3d", turned, shape.n_key * shape.n_head_kv, n, 1)
        stored = [
            self.op("set_rows", keys, flat, self.rows),
            self.op("set_rows", values, self.values, self.cells),
        ]
        heads = self.op("reshape_3d", keys, shape.n_key, shape.n_head_kv, shape.depth)
        scores = self.op(
            "mul_mat", self.op("permute", heads, 0, 2, 1, 3), self.op("permute", queries, 0, 2, 1, 3)
        )
        weights = self.op("soft_max_ext", scores, self.mask, shape.n_key**-0.5, 0.0)
        columns = self.op("reshape_3d", values, shape.depth, shape.n_value, shape.n_head_kv)
        mixed = self.op("permute", self.op("mul_mat", columns, weights), 0, 2, 1, 3)
        return stored, self.op("cont_2d", mixed, shape.n_value * shape.n_head, n)

    def experts(self) -> tuple[Any, Any]:
        shape, n = self.shape, self.n_tokens
        made = self.op("swiglu_split", self.gate, self.up)
        if shape.n_expert == 1:
            return made, self.op("reshape_3d", self.down, shape.n_embd, n, 1)
        shares = self.op("soft_max", self.logits)
        chosen = self.op("argsort_top_k", shares, shape.n_used)
        weights = self.op("get_rows", self.op("reshape_3d", shares, 1, shape.n_expert, n), chosen)
        weights = self.op("reshape_3d", weights, shape.n_used, n, 1)
        weights = self.op("div", weights, self.op("sum_rows", weights))
        scaled = self.op("mul", self.down, self.op("reshape_3d", weights, 1, shape.n_used, n))
        row, token = strides(scaled)[1:3]
        parts = [self.op("view_2d", scaled, shape.n_embd, n, token, i * row) for i in range(shape.n_used)]
        summed = parts[0]
        for part in parts[1:]:
            summed = self.op("add", summed, part)
        return made, summed


# ---- the link


def measure_link(device: str) -> float:
    """Bytes per second from host memory to a device, from pinned memory if the device has any."""
    with Device(device, 1) as ggml:
        lib = ggml.lib
        context = ggml.context(2)
        target = lib.ggml_new_tensor_3d(context, F32, _LINK_BYTES // 4, 1, 1)
        ggml.allocate(context)
        source = np.ones(_LINK_BYTES, np.uint8)
        address, pinned = source.ctypes.data_as(c_void_p), None
        buft = lib.ggml_backend_dev_host_buffer_type(ggml.device)
        if buft:
            pinned = lib.ggml_backend_buft_alloc_buffer(buft, _LINK_BYTES)
        if pinned:
            ggml.keep(ggml.context(1), pinned)
            address = lib.ggml_backend_buffer_get_base(pinned)
            ctypes.memset(address, 1, _LINK_BYTES)
        return _LINK_BYTES / timed(lambda: lib.ggml_backend_tensor_set(target, address, 0, _LINK_BYTES))
