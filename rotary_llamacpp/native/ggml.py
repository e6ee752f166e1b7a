# SPDX-License-Identifier: MIT
"""Builds and times ggml graphs on one device, without a model, for kernels.py.

Does not need our library. Not thread-safe. Tensors are pointers to struct ggml_tensor.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

from ..errors import LibraryError
from . import binding

_TRIES, _SECONDS = 7, 1.5


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TensorHead(Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (
        ("type", c_int), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4),
    )  # fmt: skip


def extents(tensor: Any) -> list[int]:
    """The four dimensions of a tensor, in ggml's order."""
    return list(ctypes.cast(tensor, POINTER(_TensorHead)).contents.ne)


def strides(tensor: Any) -> list[int]:
    """The four strides of a tensor, in bytes."""
    return list(ctypes.cast(tensor, POINTER(_TensorHead)).contents.nb)


class Device:
    """A backend of ggml and its allocations, which a ``with`` block frees at the end.

    Raises
    ------
    LibraryError
        ggml has no such device.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.lib = _functions(binding.libllama())
        self.device = self.lib.ggml_backend_dev_by_name(name.encode())
        self.backend = self.lib.ggml_backend_dev_init(self.device, None) if self.device else None
        if not self.backend:
            raise LibraryError(f"ggml: no device {name}; plan without --measure")
        if name == "CPU":
            self.lib.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self._held: list[tuple[Any, Any]] = []

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        for context, buffer in reversed(self._held):
            self.lib.ggml_backend_buffer_free(buffer)
            self.lib.ggml_free(context)
        self.lib.ggml_backend_free(self.backend)

    def context(self, n_tensors: int) -> Any:
        """Make a context for a number of tensors and a graph of them, without memory for data."""
        overhead = self.lib.ggml_tensor_overhead() * n_tensors + self.lib.ggml_graph_overhead()
        return self.lib.ggml_init(_InitParams(overhead + 4096, None, True))

    def keep(self, context: Any, buffer: Any) -> None:
        """Free context and buffer at the end; fail if the buffer is NULL."""
        if not buffer:
            self.lib.ggml_free(context)
            raise LibraryError(
                "ggml: not enough memory to time its kernels; free some, or plan without --measure"
            )
        self._held.append((context, buffer))

    def allocate(self, context: Any) -> None:
        """Allocate all tensors of a context, zeroed."""
        buffer = self.lib.ggml_backend_alloc_ctx_tensors(context, self.backend)
        self.keep(context, buffer)
        self.lib.ggml_backend_buffer_clear(buffer, 0)

    def set(self, tensor: Any, data: np.ndarray) -> None:
        """Set the bytes of a tensor."""
        self.lib.ggml_backend_tensor_set(tensor, data.ctypes.data_as(c_void_p), 0, data.nbytes)

    def extra_bufts(self) -> list[Any]:
        """Return the buffer types that store weights in another layout."""
        registry = self.lib.ggml_backend_dev_backend_reg(self.device)
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
        bufts: list[Any] = []
        while found and found[len(bufts)]:
            bufts.append(found[len(bufts)])
        return bufts

    def graph(self, context: Any, nodes: list[Any]) -> Any:
        """Make a graph that computes these nodes in this order."""
        graph = self.lib.ggml_new_graph(context)
        for node in nodes:
            self.lib.ggml_build_forward_expand(graph, node)
        return graph

    def time(self, graph: Any) -> float:
        """Median seconds of computing a graph."""

        def compute() -> None:
            if self.lib.ggml_backend_graph_compute(self.backend, graph) != 0:
                raise LibraryError("ggml: computing a graph to time it failed; plan without --measure")

        return timed(compute)


def timed(work: Callable[[], None]) -> float:
    """Median seconds of a few calls of `work`, after a first one that is not timed."""
    work()  # first touch
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < _TRIES and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _functions(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer = c_void_p
    signatures: tuple[tuple[Any, ...], ...] = (
        ("ggml_init", pointer, _InitParams),
        ("ggml_free", None, pointer),
        ("ggml_tensor_overhead", c_size_t),
        ("ggml_graph_overhead", c_size_t),
        ("ggml_new_tensor_3d", pointer, pointer, c_int, c_int64, c_int64, c_int64),
        ("ggml_mul_mat_id", pointer, *[pointer] * 4),
        ("ggml_mul_mat", pointer, *[pointer] * 3),
        ("ggml_add", pointer, *[pointer] * 3),
        ("ggml_mul", pointer, *[pointer] * 3),
        ("ggml_div", pointer, *[pointer] * 3),
        ("ggml_sum_rows", pointer, *[pointer] * 2),
        ("ggml_rms_norm", pointer, pointer, pointer, c_float),
        ("ggml_rope", pointer, pointer, pointer, pointer, c_int, c_int),
        ("ggml_soft_max", pointer, pointer, pointer),
        ("ggml_soft_max_ext", pointer, pointer, pointer, pointer, c_float, c_float),
        ("ggml_argsort_top_k", pointer, pointer, pointer, c_int),
        ("ggml_get_rows", pointer, *[pointer] * 3),
        ("ggml_set_rows", pointer, *[pointer] * 4),
        ("ggml_swiglu_split", pointer, *[pointer] * 3),
        ("ggml_permute", pointer, pointer, pointer, c_int, c_int, c_int, c_int),
        ("ggml_cont_2d", pointer, pointer, pointer, c_int64, c_int64),
        ("ggml_reshape_3d", pointer, pointer, pointer, c_int64, c_int64, c_int64),
        ("ggml_view_2d", pointer, pointer, pointer, c_int64, c_int64, c_size_t, c_size_t),
        ("ggml_new_graph", pointer, pointer),
        ("ggml_build_forward_expand", None, pointer, pointer),
        ("ggml_backend_dev_by_name", pointer, c_char_p),
        ("ggml_backend_dev_init", pointer, pointer, c_char_p),
        ("ggml_backend_dev_supports_op", c_bool, pointer, pointer),
        ("ggml_backend_dev_backend_reg", pointer, pointer),
        ("ggml_backend_reg_get_proc_address", pointer, pointer, c_char_p),
        ("ggml_backend_dev_host_buffer_type", pointer, pointer),
        ("ggml_backend_buft_alloc_buffer", pointer, pointer, c_size_t),
        ("ggml_backend_buffer_get_base", pointer, pointer),
        ("ggml_backend_buffer_clear", None, pointer, ctypes.c_uint8),
        ("ggml_backend_free", None, pointer),
        ("ggml_backend_cpu_set_n_threads", None, pointer, c_int),
        ("ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer),
        ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer),
        ("ggml_backend_buffer_free", None, pointer),
        ("ggml_backend_tensor_set", None, pointer, pointer, c_size_t, c_size_t),
        ("ggml_backend_graph_compute", c_int, pointer, pointer),
    )
    for name, result, *arguments in signatures:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
