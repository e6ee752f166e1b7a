# SPDX-License-Identifier: MIT
"""Describes the machine that a plan is for, from options, this machine, measurements or published figures.

`describe` measures nothing that takes time. `measure` times ggml's kernels, copies and the disk in a few
seconds; it uses all cores, so the machine should be idle. Neither loads a model.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from ..errors import RotaryError
from ..host import disk, machine
from ..native import binding
from ..native.kernels import KernelRates, LayerShape, Matrices, measure_layer, measure_link
from ..native.kernels import measure as measure_matrices
from ..units import MIB, parse_rate, parse_size, size
from .footprint import Footprint
from .roofline import Machine, Request

# Defaults where nothing is given or measured, as published by the makers.
_VRAM = ("936GB/s", "published, RTX 3090")
_RAM = ("58GB/s", "published, desktop DDR5")  # rate at which experts are read from it
_LINK = ("pcie4x16", "published, PCIe 4 x16")
_DISK = ("3.5GB/s", "published, NVMe on PCIe 3 x4")
_GPU_FLOPS = (35e12, "published, RTX 3090 in F32")
_CPU_FLOPS = (0.5e12, "assumed, eight cores with AVX2")
_LAYER = (140e-6, "assumed, 35 kernels")
_SYNC = 30e-6
_CELLS = 256  # llama.cpp computes attention over a multiple of this many tokens
_COPY_BYTES, _COPY_BLOCK = 512 * MIB, 2 * MIB
_COPY_TRIES = 5


def describe(
    *, vram: str | None, ram: str | None, link: str, disk: str, ram_rate: str | None, vram_rate: str | None
) -> Machine:
    """Describe a machine from options of ``rotary plan``; None and "auto" are this one or published rates.

    Raises
    ------
    RotaryError
        An option is not understood, or the kernel does not say how much memory is available.
    """
    sources: dict[str, str] = {}

    def rate(name: str, given: str | None, default: tuple[str, str]) -> float:
        text, source = (given, "given") if given not in (None, "auto") else default
        sources[name] = source
        try:
            return parse_rate(str(text)) * 1e6
        except RotaryError as error:  # parse_rate calls every rate a link
            raise RotaryError(str(error).replace("link ", f"{name} ", 1)) from None

    available = machine.available_memory()
    if ram is None and available is None:
        raise RotaryError("memory: the kernel does not say how much is available; give --ram, such as 32GiB")
    sources["ram"] = "given" if ram is not None else "available on this machine"
    vram_bytes, vram_total, sources["vram"] = _vram(vram)
    ram_bytes_rate = rate("ram rate", ram_rate, _RAM)
    return Machine(
        vram_bytes=vram_bytes,
        vram_total=vram_total,
        ram_bytes=parse_size(ram) if ram is not None else available or 0,
        vram_rate=rate("vram rate", vram_rate, _VRAM),
        link_rate=rate("link", link, _LINK),
        ram_rate=ram_bytes_rate,
        copy_rate=ram_bytes_rate / 2,  # what is copied is read and written
        disk_rate=rate("disk", disk, _DISK),
        gpu_flops=_GPU_FLOPS[0],
        cpu_flops=_CPU_FLOPS[0],
        gpu_layer_s=_LAYER[0],
        cpu_layer_s=_LAYER[0],
        sync_s=_SYNC,
        sources={
            **sources,
            "gpu compute": _GPU_FLOPS[1],
            "cpu compute": _CPU_FLOPS[1],
            "gpu layer": _LAYER[1],
            "cpu layer": _LAYER[1],
            "sync": "assumed, a wait of the host for the GPU",
        },
    )


def _vram(given: str | None) -> tuple[int, int, str]:
    """Free bytes of GPU memory, total bytes, and the source of both."""
    if given is not None:
        return (n_bytes := parse_size(given)), n_bytes, "given"
    lib = _library()
    if lib is None:
        return 0, 0, "no GPU is known: the native library cannot be loaded"
    memory = [lib.device_memory(inner) for inner in lib.default_inner if inner != "CPU"]
    total = sum(each for _, each in memory)
    if not total:
        return 0, 0, "this machine has no GPU that ggml knows"
    if not all(free for free, each in memory if each):
        return total, total, "all on this machine, because the GPU does not say what is free"
    return sum(free for free, _ in memory), total, f"free of {size(total)} on this machine"


def measure(
    described: Machine, footprint: Footprint, request: Request, model: Path | None, threads: int,
    given: frozenset[str],
) -> Machine:  # fmt: skip
    """Replace published figures with measured rates of this machine, except those in `given`.

    Parameters
    ----------
    model : Path, optional
        A file to read the disk with; by default a temporary one is written.
    given : frozenset of str
        Which of "link", "disk", "ram rate" and "vram rate" were given as options.

    Raises
    ------
    RotaryError
        ggml's kernels cannot be timed.
    """
    sources = dict(described.sources or {})
    found = described
    if "ram rate" not in given:
        found = _cpu(found, footprint, request, threads, sources)
    if "disk" not in given:
        found = _disk(found, model, sources)
    gpu = _gpu() if described.vram_bytes else None
    if gpu is not None:
        found = _device(found, footprint, request, gpu, sources, given)
    elif described.vram_bytes:
        sources["link"] += "; there is no GPU here to measure it with" if "link" not in given else ""
    return replace(found, sources=sources)


def _disk(described: Machine, model: Path | None, sources: dict[str, str]) -> Machine:
    """Replace the disk's rate with that measured on the model's disk, if it can be measured."""
    try:
        cold, place = disk.measure(model)
    except RotaryError as error:
        sources["disk"] += f"; not measured: {str(error).rpartition('; ')[0]}"
        return described
    except (OSError, RuntimeError) as error:  # nowhere to write, or a thread cannot be started
        sources["disk"] += f"; not measured: {error}"
        return described
    sources["disk"] = f"measured: {cold.how} reads of {place if model else f'a temporary file in {place}'}"
    if cold.own:
        sources["disk"] += (
            "; processor time counts this process alone, because others run beside this container"
        )
    return replace(
        described, disk_rate=cold.rate, disk_cpu_s=cold.busy / max(cold.n_bytes, 1) / machine.cpu_count()
    )


def _library() -> binding.Library | None:
    """Load the native library; None where that fails, because a plan for another machine does not need it."""
    try:
        return binding.loaded() or binding.load()
    except (RotaryError, ImportError, OSError):
        return None


def _gpu() -> str | None:
    lib = _library()
    return next((inner for inner in lib.default_inner if inner != "CPU"), None) if lib else None


def _device(
    described: Machine, footprint: Footprint, request: Request, gpu: str, sources: dict[str, str],
    given: frozenset[str],
) -> Machine:  # fmt: skip
    """Replace the rates of GPU and link with measured ones."""
    rates = _rates(footprint, 1, gpu)
    token, prompt = _layer(footprint, request, rates.token_rate, 1, gpu)
    found = replace(described, gpu_flops=rates.prompt_flops, gpu_layer_s=token, gpu_prompt_layer_s=prompt)
    sources["gpu compute"] = sources["gpu layer"] = f"measured: {gpu}"
    if "vram rate" not in given:
        found = replace(found, vram_rate=rates.token_rate)
        sources["vram rate"] = f"measured: {gpu}"
    if "link" not in given:
        found = replace(found, link_rate=measure_link(gpu))
        sources["link"] = f"measured: copies to {gpu}"
    return found


def _rates(footprint: Footprint, threads: int, device: str = "CPU") -> KernelRates:
    """Measure the rates of a model's matrices; the largest dense matrix stands for all dense ones.

    Kernels are slower for short rows, and faster for prompts with dense matrices. Matrices are weighted by
    bytes for a decoded token, and by operations for a token of the prompt.
    """
    parts = []  # bytes, operations, rates; the first entry says whether experts are repacked
    with binding.native_log_muted():
        if footprint.layers:
            layer, matrices = footprint.layers[0], footprint.matrices
            n_stored = sum(each.n_expert for each in footprint.layers)
            elements = sum(matrix.n_in * matrix.n_out for matrix in matrices)
            for matrix, times in Counter(matrices).items():
                shape = (matrix.type_name, matrix.n_in, matrix.n_out)
                experts = Matrices(*shape, layer.n_expert, layer.n_expert_used, n_stored)
                rates = measure_matrices(experts, threads, device)
                n_bytes = footprint.chosen_bytes * times * matrix.n_bytes / layer.expert_bytes
                flops = footprint.expert_flops * times * matrix.n_in * matrix.n_out / elements
                parts.append((n_bytes, flops, rates))
        dense = footprint.dense
        rates = measure_matrices(Matrices(dense.type_name, dense.n_in, dense.n_out), threads, device)
        parts.append((footprint.token_bytes, footprint.token_flops - footprint.output_flops, rates))
    seconds = sum(n_bytes / rates.token_rate for n_bytes, _, rates in parts)
    prompt = sum(flops / rates.prompt_flops for _, flops, rates in parts)
    return replace(
        parts[0][2],
        token_rate=sum(n_bytes for n_bytes, _, _ in parts) / seconds,
        prompt_flops=sum(flops for _, flops, _ in parts) / prompt,
    )


def _layer(
    footprint: Footprint, request: Request, token_rate: float, threads: int, device: str = "CPU"
) -> tuple[float, float]:
    """Seconds of a layer beside reading weights and KV cache: per decoded token, and per prompt token."""
    # A header may have 0 or inconsistent numbers here, with which ggml would abort.
    n_head, n_head_kv, n_key, n_value = (max(2, number) for number in astuple(footprint.heads))
    if n_head % n_head_kv:
        n_head_kv = n_head
    layer = footprint.layers[0] if footprint.layers else None
    n_ff = min((matrix.n_in for matrix in footprint.matrices), default=footprint.n_embd)

    def seconds(depth: int, n_tokens: int) -> float:
        shape = LayerShape(
            footprint.n_embd, n_head, n_head_kv, n_key, n_value,
            layer.n_expert if layer else 1, layer.n_expert_used if layer else 1, n_ff,
            -(-depth // _CELLS) * _CELLS,
        )  # fmt: skip
        return measure_layer(shape, n_tokens, threads, device)

    read = footprint.kv_read_bytes(request.depth) / footprint.n_layer / token_rate
    n_tokens = request.micro_batch
    return max(0.0, seconds(request.depth, 1) - read), seconds(request.prompt_depth, n_tokens) / n_tokens


def _cpu(
    described: Machine, footprint: Footprint, request: Request, threads: int, sources: dict[str, str]
) -> Machine:
    """Replace the CPU's rates with measured ones."""
    rates = _rates(footprint, threads)
    token, prompt = _layer(footprint, request, rates.token_rate, threads)
    types = dict.fromkeys([*(matrix.type_name for matrix in footprint.matrices), footprint.dense.type_name])
    sources["ram rate"] = sources["cpu compute"] = sources["cpu layer"] = (
        f"measured: ggml's {', '.join(types)} kernels{', experts repacked,' if rates.repacked else ''} "
        f"with {threads} threads"
    )
    return replace(
        described, ram_rate=rates.token_rate, cpu_flops=rates.prompt_flops, cpu_layer_s=token,
        cpu_prompt_layer_s=prompt, copy_rate=copy_rate(threads),
        repack_rate=rates.fill_rate * threads if rates.repacked else 0.0,
    )  # fmt: skip


def copy_rate(threads: int) -> float:
    """Bytes per second that threads copy together, in blocks of an expert's size."""
    source = np.full(_COPY_BYTES, 1, np.uint8)
    target = np.zeros(_COPY_BYTES, np.uint8)

    def copy(first: int) -> None:
        for at in range(first * _COPY_BLOCK, _COPY_BYTES, threads * _COPY_BLOCK):
            target[at : at + _COPY_BLOCK] = source[at : at + _COPY_BLOCK]  # releases the GIL

    seconds = []
    for _ in range(_COPY_TRIES):
        workers = [threading.Thread(target=copy, args=(i,)) for i in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - start)
    return _COPY_BYTES / statistics.median(seconds)
