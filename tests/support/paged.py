# SPDX-License-Identifier: MIT
"""Paged runs that tests compare with stock's, and helpers for them."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp._internals as internals
import llama_cpp.llama_cpp as api
import numpy as np
from gguf import GGUFWriter

from rotary_llamacpp import Llama
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.native import binding as _native
from tests.support import ROOT, write_all
from tests.support.processes import has_io_uring, reads_directly
from tests.support.tracing import OPTIONS, trace


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call, or its error's type and text."""
    try:
        return function(*args)
    except Exception as error:
        return type(error).__name__, str(error)


def load_late() -> None:
    """Load LATE0 into ggml, in a process with the environment of the fixture `late`."""
    llama = _native.libllama()
    llama.ggml_backend_load.restype = ctypes.c_void_p
    library = os.environ.get("LATE_DEVICE") or os.environ["ROTARY_LINK"]
    assert llama.ggml_backend_load(library.encode()), "no LATE0"


def make(model: Path, rotary: Any, **options: Any) -> Llama:
    """Load a model with the options that tracing.py gives to stock."""
    return Llama(str(model), rotary=rotary, **{**OPTIONS, **options})


def stock_trace(model: Path, **options: Any) -> dict[str, np.ndarray]:
    """Logits and greedy tokens of stock llama_cpp, from a process that does not import rotary_llamacpp."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "tests" / "support" / "tracing.py"
        command = [sys.executable, script, model, f"{folder}/out.npz", json.dumps(options)]
        subprocess.run(command, check=True, stderr=subprocess.PIPE)
        return dict(np.load(f"{folder}/out.npz"))


def paged_trace(
    model: Path, n_prompt: int, rotary: Any, n_decode: int = 12, **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Logits and greedy tokens of a paged run, and its statistics."""
    llama = make(model, rotary, **options)
    try:
        return trace(llama, n_prompt, n_decode), llama.rotary_stats()
    finally:
        llama.close()


def second_context(llama: Llama) -> tuple[Any, Callable[[list[int]], np.ndarray]]:
    """Another context of the model of `llama`, and a function that evaluates tokens in it."""
    context = internals.LlamaContext(model=llama._model, params=llama.context_params, verbose=False)

    def run(tokens):
        api.llama_memory_clear(api.llama_get_memory(context.ctx), True)
        batch = internals.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False)
        batch.set_batch(batch=tokens, n_past=0, logits_all=True)
        context.decode(batch)
        shape = (len(tokens), llama.n_vocab())
        out = np.ctypeslib.as_array(context.get_logits(), shape=shape).copy()
        batch.close()
        return out

    return context, run


def logits(llama: Any, tokens: list[int]) -> np.ndarray:
    """Logits of tokens that are evaluated at once."""
    llama.reset()
    llama.eval(tokens)
    return llama.scores[: len(tokens)].copy()


def use_adapter(llama: Any, adapter: Any) -> None:
    """Apply a LoRA adapter of llama.cpp's with weight 1 in the model's context, or none."""
    adapters, scales = (api.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    assert api.llama_set_adapters_lora(llama._ctx.ctx, adapters, adapter is not None, scales) == 0


def assert_equal(paged: Mapping[str, np.ndarray], stock: Mapping[str, np.ndarray]) -> None:
    """Check that tokens and logits are equal to the bit, and that the logits are not trivial."""
    assert paged["greedy"].tolist() == stock["greedy"].tolist()
    assert paged["logits"].shape == stock["logits"].shape
    assert np.isfinite(stock["logits"]).all() and stock["logits"].std() > 0.1, "the reference says something"
    different = (paged["logits"] != stock["logits"]).any(axis=1)
    worst = np.abs(paged["logits"] - stock["logits"]).max()
    assert not different.any(), f"positions {np.flatnonzero(different)} differ, by up to {worst}"


def notices(stats: Mapping[str, Any]) -> list[str]:
    """The notices of a run, except those that the machine causes: it may have no io_uring, as in many
    containers, or the model's file system may refuse direct reads."""

    def is_forced(text: str) -> bool:
        if "io_uring" in text:
            return not has_io_uring()
        return "refuses direct reads" in text and not reads_directly(text.partition(": ")[0])

    return [text for text in stats["notices"] if not is_forced(text)]


def write_adapter(path: Path, model: Path, names: tuple[str, ...], seed: int = 0) -> Path:
    """A random LoRA adapter of rank 4 for the qwen3moe tensors whose names contain one of `names`."""
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rng = np.random.default_rng(seed)
    for tensor in read_header(model).tensors:
        if any(name in tensor.name for name in names):
            n_in, n_out, *experts = tensor.shape
            for half, shape in (("a", (*experts, 4, n_in)), ("b", (*experts, n_out, 4))):
                values = rng.normal(scale=0.05, size=shape).astype(np.float32)
                writer.add_tensor(f"{tensor.name}.lora_{half}", values)
    write_all(writer)
    return path
