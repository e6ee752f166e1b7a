# SPDX-License-Identifier: MIT
"""How fast ggml's kernels are here: MUL_MAT_ID of a model's experts and MUL_MAT, for a token and a prompt.

Memory's own bandwidth says little of decode on a CPU: unpacking a quantisation often takes longer than
reading it, and depends on the type, the instruction set and on whether ggml repacks the weights. So the
kernel itself is timed, in the buffer that llama.cpp would choose. Besides _native.py the only module that
calls ggml; it needs neither our library nor a model, and leaves nothing behind. One thread at a time.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from . import _native
from .errors import LibraryError

_F32, _I32 = 0, 26  # enum ggml_type
_MOST_BYTES = 256 << 20  # of weights; many times what caches hold
_MATRIX_BYTES = 64 << 20
_READ_BYTES = 192 << 20  # by one graph of decode
_MOST_NODES = 256  # a graph of ggml_new_graph() has room for 2048, inputs included
_LINK_BYTES = 128 << 20
_TRIES, _SECONDS = 7, 1.5


@dataclass(frozen=True)
class KernelRates:
    """Of one type of weights.

    Attributes
    ----------
    token_rate : float
        Bytes of weights per second, a token at a time.
    prompt_flops : float
        Operations per second, 512 tokens at a time.
    fill_rate : float
        Bytes per second that one thread puts into place, repacking included.
    repacked : bool
        ggml has another layout for the type on this CPU.
    step_s : float
        Seconds of a node with next to nothing to compute: starting it, and threads waiting for each other.
    """

    token_rate: float
    prompt_flops: float
    fill_rate: float
    repacked: bool
    step_s: float


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def measure(
    type_name: str, n_in: int, n_out: int, n_expert: int, n_used: int, threads: int, device: str = "CPU"
) -> KernelRates:
    """Time a multiplication on a device.

    Parameters
    ----------
    device : str
        ggml's name of it.
    type_name : str
        ggml's name of the weights' type, such as ``"Q8_0"``.
    n_in, n_out : int
        Of one expert's matrix.
    n_expert : int
        1: a plain matrix, with MUL_MAT, of as many rows as a cache cannot hold.

    Raises
    ------
    LibraryError
        ggml cannot do this.
    """
    kind = GGMLQuantizationType[type_name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if n_in % block:
        raise LibraryError(f"{type_name}: rows of {n_in} are no blocks of {block}; measure another type")
    row_bytes = n_in // block * block_bytes
    if n_expert == 1:  # alone it must not stay in a cache either
        n_out = max(n_out, _MATRIX_BYTES // row_bytes)
    matrix_bytes = row_bytes * n_out
    n_expert = max(n_used, min(n_expert, _MOST_BYTES // matrix_bytes))
    with _Graphs(device, threads) as graphs:
        weights = graphs.weights(int(kind), n_in, n_out, n_expert, n_used)
        # Of any type a small finite number: random scales would be NaN or denormal, which is slow.
        data = np.full(n_expert * matrix_bytes, 0x3C, np.uint8)
        start = time.perf_counter()
        graphs.set(weights, data)
        fill_rate = data.nbytes / (time.perf_counter() - start)
        n_nodes = min(max(1, _READ_BYTES // (n_used * matrix_bytes)), _MOST_NODES)
        token = graphs.time(weights, n_expert, n_used, n_tokens=1, n_nodes=n_nodes)
        n_tokens = 512 if n_expert > 1 else 128
        prompt = graphs.time(weights, n_expert, n_used, n_tokens, n_nodes=1)
        return KernelRates(
            n_nodes * n_used * matrix_bytes / token,
            n_tokens * n_used * 2.0 * n_in * n_out / prompt,
            fill_rate,
            graphs.repacked,
            graphs.time_steps(n_in),
        )


def measure_link(device: str) -> float:
    """Bytes per second from host memory to a device's, page-locked where the device knows such memory."""
    with _Graphs(device, 1) as graphs:
        return _LINK_BYTES / graphs.time_copy(_LINK_BYTES)


class _Graphs:
    """A backend of ggml's, its weights, and graphs over them."""

    def __init__(self, device: str, threads: int) -> None:
        self.lib = _functions(_native.libllama())
        self.device = self.lib.ggml_backend_dev_by_name(device.encode())
        self.backend = self.lib.ggml_backend_dev_init(self.device, None) if self.device else None
        if not self.backend:
            raise LibraryError(
                f"ggml: no device {device}; its kernels cannot be timed; plan without --measure"
            )
        if device == "CPU":
            self.lib.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.held: list[tuple[Any, Any]] = []
        self.repacked = False

    def __enter__(self) -> _Graphs:
        return self

    def __exit__(self, *_: object) -> None:
        for context, buffer in reversed(self.held):
            self.lib.ggml_backend_buffer_free(buffer)
            self.lib.ggml_free(context)
        self.lib.ggml_backend_free(self.backend)

    def context(self, n_tensors: int) -> Any:
        overhead = self.lib.ggml_tensor_overhead() * n_tensors + self.lib.ggml_graph_overhead()
        return self.lib.ggml_init(_InitParams(overhead + 4096, None, True))

    def keep(self, context: Any, buffer: Any) -> None:
        if not buffer:
            self.lib.ggml_free(context)
            raise LibraryError(
                "ggml: not enough memory to time its kernels; free some; plan without --measure"
            )
        self.held.append((context, buffer))

    def weights(self, kind: int, n_in: int, n_out: int, n_expert: int, n_used: int) -> Any:
        """In the first buffer type that has another layout for them, else in plain memory."""
        lib = self.lib
        for buft in self._extra_bufts():
            context = self.context(8)
            weights = lib.ggml_new_tensor_3d(context, kind, n_in, n_out, n_expert)
            buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buft)
            if buffer:
                node = self._node(context, weights, n_used, 1)[0]
                if lib.ggml_backend_dev_supports_op(self.device, node):
                    self.keep(context, buffer)
                    self.repacked = True
                    return weights
                lib.ggml_backend_buffer_free(buffer)
            lib.ggml_free(context)
        context = self.context(2)
        weights = lib.ggml_new_tensor_3d(context, kind, n_in, n_out, n_expert)
        self.keep(context, lib.ggml_backend_alloc_ctx_tensors(context, self.backend))
        return weights

    def _extra_bufts(self) -> list[Any]:
        registry = self.lib.ggml_backend_dev_backend_reg(self.device)
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
        bufts: list[Any] = []
        while found and found[len(bufts)]:
            bufts.append(found[len(bufts)])
        return bufts

    def _node(self, context: Any, weights: Any, n_used: int, n_tokens: int) -> tuple[Any, Any, Any]:
        lib = self.lib
        n_in, _, n_expert, _ = ctypes.cast(weights, POINTER(_TensorHead)).contents.ne
        if n_expert == 1:
            inputs = lib.ggml_new_tensor_3d(context, _F32, n_in, n_tokens, 1)
            return lib.ggml_mul_mat(context, weights, inputs), inputs, None
        inputs = lib.ggml_new_tensor_3d(context, _F32, n_in, 1, n_tokens)
        ids = lib.ggml_new_tensor_3d(context, _I32, n_used, n_tokens, 1)
        return lib.ggml_mul_mat_id(context, weights, inputs, ids), inputs, ids

    def set(self, tensor: Any, data: np.ndarray) -> None:
        self.lib.ggml_backend_tensor_set(tensor, data.ctypes.data_as(c_void_p), 0, data.nbytes)

    def time_copy(self, n_bytes: int) -> float:
        """Seconds of one copy to the device."""
        lib = self.lib
        context = self.context(2)
        target = lib.ggml_new_tensor_3d(context, _F32, n_bytes // 4, 1, 1)
        self.keep(context, lib.ggml_backend_alloc_ctx_tensors(context, self.backend))
        source = np.ones(n_bytes, np.uint8)
        address, locked = source.ctypes.data_as(c_void_p), None
        buft = lib.ggml_backend_dev_host_buffer_type(self.device)
        if buft:
            locked = lib.ggml_backend_buft_alloc_buffer(buft, n_bytes)
        if locked:
            self.keep(self.context(1), locked)
            address = lib.ggml_backend_buffer_get_base(locked)
            ctypes.memset(address, 1, n_bytes)
        return self._timed(lambda: lib.ggml_backend_tensor_set(target, address, 0, n_bytes))

    def time_steps(self, n_values: int) -> float:
        """Seconds of a node that adds two hidden states."""
        lib = self.lib
        context = self.context(_MOST_NODES + 8)
        first = lib.ggml_new_tensor_3d(context, _F32, n_values, 1, 1)
        node = first
        graph = lib.ggml_new_graph(context)
        for _ in range(_MOST_NODES):
            node = lib.ggml_add(context, node, first)
        lib.ggml_build_forward_expand(graph, node)
        self.keep(context, lib.ggml_backend_alloc_ctx_tensors(context, self.backend))
        self.set(first, np.zeros(n_values, np.float32))
        return self._median(graph) / _MOST_NODES

    def time(self, weights: Any, n_expert: int, n_used: int, n_tokens: int, n_nodes: int) -> float:
        """Seconds of a graph of so many lookups, each of experts of its own; the median."""
        lib, rng = self.lib, np.random.default_rng(1)
        context = self.context(3 * n_nodes + 8)
        nodes = [self._node(context, weights, n_used, n_tokens) for _ in range(n_nodes)]
        graph = lib.ggml_new_graph(context)
        for node, _, _ in nodes:
            lib.ggml_build_forward_expand(graph, node)
        self.keep(context, lib.ggml_backend_alloc_ctx_tensors(context, self.backend))
        order = rng.permutation(n_expert)
        for i, (_, inputs, ids) in enumerate(nodes):
            head = ctypes.cast(inputs, POINTER(_TensorHead)).contents
            self.set(inputs, rng.standard_normal(head.ne[0] * n_tokens).astype(np.float32))
            if ids is None:
                continue
            if n_tokens == 1:  # one after the other, so that no cache has them still
                chosen = order[(i * n_used + np.arange(n_used)) % n_expert]
            else:
                chosen = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_tokens)])
            self.set(ids, np.ascontiguousarray(chosen, np.int32))
        return self._median(graph)

    def _median(self, graph: Any) -> float:
        def compute() -> None:
            if self.lib.ggml_backend_graph_compute(self.backend, graph) != 0:
                raise LibraryError("ggml: computing MUL_MAT_ID failed; plan without --measure")

        return self._timed(compute)

    def _timed(self, work: Callable[[], None]) -> float:
        work()  # first touch
        seconds: list[float] = []
        begin = time.perf_counter()
        while len(seconds) < 3 or (len(seconds) < _TRIES and time.perf_counter() - begin < _SECONDS):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


class _TensorHead(Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (("type", c_int), ("buffer", c_void_p), ("ne", c_int64 * 4))


def _functions(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer = c_void_p
    for name, result, arguments in (
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_tensor_overhead", c_size_t, []),
        ("ggml_graph_overhead", c_size_t, []),
        ("ggml_new_tensor_3d", pointer, [pointer, c_int, c_int64, c_int64, c_int64]),
        ("ggml_mul_mat_id", pointer, [pointer] * 4),
        ("ggml_mul_mat", pointer, [pointer] * 3),
        ("ggml_add", pointer, [pointer] * 3),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_backend_dev_by_name", pointer, [c_char_p]),
        ("ggml_backend_dev_init", pointer, [pointer, c_char_p]),
        ("ggml_backend_dev_supports_op", c_bool, [pointer, pointer]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, c_char_p]),
        ("ggml_backend_dev_host_buffer_type", pointer, [pointer]),
        ("ggml_backend_buft_alloc_buffer", pointer, [pointer, c_size_t]),
        ("ggml_backend_buffer_get_base", pointer, [pointer]),
        ("ggml_backend_free", None, [pointer]),
        ("ggml_backend_cpu_set_n_threads", None, [pointer, c_int]),
        ("ggml_backend_alloc_ctx_tensors", pointer, [pointer, pointer]),
        ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        ("ggml_backend_buffer_free", None, [pointer]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, c_size_t, c_size_t]),
        ("ggml_backend_graph_compute", c_int, [pointer, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
