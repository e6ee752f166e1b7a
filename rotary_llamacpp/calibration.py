# SPDX-License-Identifier: MIT
"""The machine that a plan is for: what was said of it, what it has, what is measured, else published figures.

`describe` alone measures nothing that takes time. `measure` times ggml's kernels, copies and the disk, a few
seconds in all; on an idle machine, for all cores are used. It never loads a model.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import _native, machine
from ._kernels import KernelRates, measure_link
from ._kernels import measure as kernel_rates
from .config import MIB, parse_bytes
from .errors import RotaryError
from .footprint import Footprint
from .roofline import Machine
from .simulation import parse_rate

# Stand-ins where nothing was said or measured. Of their makers, but for the efficiencies.
_VRAM = ("936GB/s", "published, RTX 3090")
_RAM = ("58GB/s", "published, desktop DDR5")  # what DRAM-bound experts get of it
_LINK = ("pcie4x16", "published, PCIe 4 x16")
_DISK = ("3.5GB/s", "published, NVMe on PCIe 3 x4")
_GPU_FLOPS = (35e12, "published, RTX 3090 in F32")
_CPU_FLOPS = (0.5e12, "assumed, eight cores with AVX2")
_GPU_STEP = (4e-6, "assumed, of CUDA kernels")
_CPU_STEP = (4e-6, "assumed")
_COPY_BYTES, _COPY_BLOCK = 512 * MIB, 2 * MIB
_COPY_TRIES = 5


def describe(
    *, vram: str | None, ram: str | None, link: str, disk: str, ram_rate: str | None, vram_rate: str | None
) -> Machine:
    """The machine of the options of ``rotary plan``; None and "auto" mean this one's, or published figures.

    Raises
    ------
    RotaryError
        An option that is not understood, or memory that the kernel does not tell.
    """
    sources: dict[str, str] = {}

    def rate(name: str, given: str | None, default: tuple[str, str]) -> float:
        text, source = (given, "given") if given not in (None, "auto") else default
        sources[name] = source
        try:
            return parse_rate(str(text)) * 1e6
        except RotaryError as error:  # of a link, by its name there
            raise RotaryError(str(error).replace("link ", f"{name} ", 1)) from None

    there = machine.available_memory()
    if ram is None and there is None:
        raise RotaryError("memory: the kernel does not say how much is available; give --ram, such as 32GiB")
    sources["ram"] = "given" if ram is not None else "available on this machine"
    vram_bytes, sources["vram"] = _vram(vram)
    ram_bytes_rate = rate("ram rate", ram_rate, _RAM)
    return Machine(
        vram_bytes=vram_bytes,
        ram_bytes=parse_bytes(ram) if ram is not None else there or 0,
        vram_rate=rate("vram rate", vram_rate, _VRAM),
        link_rate=rate("link", link, _LINK),
        ram_rate=ram_bytes_rate,
        copy_rate=ram_bytes_rate / 2,  # what is copied is read and written
        disk_rate=rate("disk", disk, _DISK),
        gpu_flops=_GPU_FLOPS[0],
        cpu_flops=_CPU_FLOPS[0],
        gpu_step_s=_GPU_STEP[0],
        cpu_step_s=_CPU_STEP[0],
        sources={
            **sources,
            "gpu compute": _GPU_FLOPS[1],
            "cpu compute": _CPU_FLOPS[1],
            "gpu step": _GPU_STEP[1],
            "cpu step": _CPU_STEP[1],
        },
    )


def _vram(given: str | None) -> tuple[int, str]:
    if given is not None:
        return parse_bytes(given), "given"
    lib = _native.loaded()
    if lib is None:
        try:
            lib = _native.load()
        except (RotaryError, ImportError, OSError):
            return 0, "no GPU is known: the native library cannot be loaded"
    total = sum(lib.device_memory(inner) for inner in lib.default_inner if inner != "CPU")
    return total, "of this machine" if total else "this machine has no GPU that ggml knows"


def measure(
    described: Machine, footprint: Footprint, model: Path | None, threads: int, given: frozenset[str]
) -> Machine:
    """The same with rates of this machine in place of published figures; what is in `given` stays.

    Parameters
    ----------
    model : Path, optional
        A file to read the disk with; by default a temporary one is written.
    given : frozenset of str
        Of "link", "disk", "ram rate", "vram rate": what was said, perhaps of another machine.

    Raises
    ------
    RotaryError
        ggml's kernels cannot be timed.
    """
    sources = dict(described.sources or {})
    found = described
    if "ram rate" not in given:
        found, how = _kernels(found, footprint, threads)
        sources["ram rate"] = sources["cpu compute"] = sources["cpu step"] = how
    if "disk" not in given:
        speed, how = _disk(model)
        found = replace(found, disk_rate=speed)
        sources["disk"] = how
    gpu = _gpu() if described.vram_bytes else None
    if gpu is not None:
        found = _device(found, footprint, gpu, sources, given)
    elif described.vram_bytes:
        sources["link"] += "; there is no GPU here to measure it with" if "link" not in given else ""
    return replace(found, sources=sources)


def _gpu() -> str | None:
    lib = _native.loaded()
    return next((inner for inner in lib.default_inner if inner != "CPU"), None) if lib else None


def _device(
    described: Machine, footprint: Footprint, gpu: str, sources: dict[str, str], given: frozenset[str]
) -> Machine:
    """The same with the rates of a GPU here: its kernels and the link to it."""
    rates = _rates(footprint, 1, gpu)
    found = replace(described, gpu_flops=rates.prompt_flops, gpu_step_s=rates.step_s)
    sources["gpu compute"] = sources["gpu step"] = f"measured: {gpu}"
    if "vram rate" not in given:
        found = replace(found, vram_rate=rates.token_rate)
        sources["vram rate"] = f"measured: {gpu}"
    if "link" not in given:
        found = replace(found, link_rate=measure_link(gpu))
        sources["link"] = f"measured: copies to {gpu}"
    return found


def _rates(footprint: Footprint, threads: int, device: str = "CPU") -> KernelRates:
    """Of the model's matrices together: the experts' two shapes, and a square for all others.

    An expert's last matrix has short rows, on which kernels are slower; plain matrices have faster ones for
    prompts. Each counts by its bytes in a token, and its operations in one of the prompt.
    """
    dense = (footprint.token_bytes, footprint.token_flops - footprint.output_flops)
    parts = []  # bytes, operations, rates; what says whether experts are repacked first
    with _native.native_log_muted():
        if footprint.layers:
            layer, (n_in, n_out) = footprint.layers[0], footprint.expert_shape
            for share, n_row, n_rows in ((2 / 3, n_in, n_out), (1 / 3, n_out, n_in)):
                rates = kernel_rates(
                    layer.types[0], n_row, n_rows, layer.n_expert, layer.n_expert_used, threads, device
                )
                parts.append((share * footprint.chosen_bytes, share * footprint.expert_flops, rates))
        square = footprint.n_embd
        rates = kernel_rates(footprint.dense_type, square, square, 1, 1, threads, device)
        parts.append((*dense, rates))
    seconds = sum(n_bytes / rates.token_rate for n_bytes, _, rates in parts)
    prompt = sum(flops / rates.prompt_flops for _, flops, rates in parts)
    return replace(
        parts[0][2],
        token_rate=sum(n_bytes for n_bytes, _, _ in parts) / seconds,
        prompt_flops=sum(flops for _, flops, _ in parts) / prompt,
    )


def _kernels(described: Machine, footprint: Footprint, threads: int) -> tuple[Machine, str]:
    rates = _rates(footprint, threads)
    # A repacked expert is rewritten, a plain one copied.
    copy = rates.fill_rate * threads if rates.repacked else copy_rate(threads)
    kinds = dict.fromkeys(
        [*(footprint.layers[0].types[:1] if footprint.layers else ()), footprint.dense_type]
    )
    how = (
        f"measured: ggml's {' and '.join(kinds)} kernels{', experts repacked,' if rates.repacked else ''} "
        f"with {threads} threads"
    )
    return replace(
        described, ram_rate=rates.token_rate, cpu_flops=rates.prompt_flops, copy_rate=copy,
        cpu_step_s=rates.step_s, repacks=rates.repacked,
    ), how  # fmt: skip


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


def _disk(model: Path | None) -> tuple[float, str]:
    from .doctor import measure_disk

    n_bytes, seconds, how, place = measure_disk(model)
    return n_bytes / max(seconds, 1e-9), f"measured: {how} reads of {place}"
