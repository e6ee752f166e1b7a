# SPDX-License-Identifier: MIT
"""The seconds that a token takes on a machine, by the bytes and operations it needs. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..units import MIB
from .footprint import Footprint
from .hits import Hits

VRAM, LINK, RAM, DISK, COMPUTE, STEPS = "VRAM", "link", "RAM", "disk", "compute", "steps"


@dataclass(frozen=True)
class Machine:
    """Capacities in bytes, rates in bytes or operations per second, and where each rate comes from."""

    vram_bytes: int
    ram_bytes: int
    vram_rate: float
    link_rate: float
    ram_rate: float  # weights read by the CPU's kernels, one token at a time
    copy_rate: float  # all threads
    disk_rate: float
    gpu_flops: float
    cpu_flops: float
    # Seconds of a layer beside reading weights and KV cache: attention, norms, starting nodes.
    gpu_layer_s: float = 0.0
    cpu_layer_s: float = 0.0
    # Seconds of a layer for a token of a prompt; None estimates attention by operations.
    gpu_prompt_layer_s: float | None = None
    cpu_prompt_layer_s: float | None = None
    disk_cpu_s: float = 0.0  # processor seconds for a byte of direct reads, over the number of CPUs
    # Rate at which all threads repack experts for the CPU's kernels; 0 if these take the file's layout.
    repack_rate: float = 0.0
    vram_total: int = 0  # bytes; `vram_bytes` of them are free
    sync_s: float = 0.0  # time of one wait of the host for a GPU
    sources: dict[str, str] | None = None


@dataclass(frozen=True)
class Request:
    """A request to the model, in tokens. Decode is estimated at the mean depth of the answer."""

    n_ctx: int = 4096
    prompt: int = 512
    answer: int = 128
    n_ubatch: int = 512

    @property
    def depth(self) -> int:
        """Tokens in the KV cache while the answer is decoded, on average."""
        return min(self.n_ctx, self.prompt + self.answer // 2)

    @property
    def micro_batch(self) -> int:
        """Tokens of the prompt that are computed at once."""
        return min(self.prompt, self.n_ubatch)

    @property
    def prompt_depth(self) -> int:
        """Tokens in the KV cache while the prompt is computed, on average of its micro-batches."""
        return (self.prompt + self.micro_batch) // 2


@dataclass(frozen=True)
class Cost:
    """Seconds of a token, by cause. `seconds` is less than the sum where causes overlap."""

    parts: dict[str, float]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1 / self.seconds

    @property
    def limit(self) -> str:
        """The cause that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True)
class Case:
    """A model on a machine."""

    model: str  # path to write in commands
    print: Footprint
    machine: Machine
    request: Request
    hits: Hits
    budget: str = "auto"
    store: str = "auto"
    threads: int | None = None  # of the CPU, to write in commands

    @property
    def ram_free(self) -> int:
        """Memory less the margin that Rotary leaves free: a 24th, at least 64 MiB."""
        return self.machine.ram_bytes - max(64 * MIB, self.machine.ram_bytes // 24)

    @property
    def fill_rate(self) -> float:
        """Bytes per second that fill slots of the CPU."""
        return self.machine.repack_rate or self.machine.copy_rate

    @property
    def buffers(self) -> int:
        """Estimated bytes of compute buffers: logits and eight hidden states of a micro-batch, in F32."""
        return self.request.n_ubatch * 4 * (self.print.n_vocab + 8 * self.print.n_embd)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of weights that stay in host memory, whichever device computes."""
        return self.print.resident_bytes - self.print.token_bytes

    def fixed(self, windows: bool) -> int:
        """Bytes on the device that computes: weights that are not experts, KV cache, buffers."""
        return self.print.token_bytes + self.print.kv_bytes(self.request.n_ctx, windows) + self.buffers

    def touched(self, first: int = 0, last: int | None = None) -> float:
        """Bytes of the experts of some layers that a micro-batch of the prompt wants at least once."""
        return sum(
            layer.layer_bytes * (1 - (1 - layer.n_expert_used / layer.n_expert) ** self.request.micro_batch)
            for layer in self.print.layers[first:last]
        )

    def per_token(self, micro_batch: float) -> float:
        """A token's share of what is done once per micro-batch of the prompt."""
        return micro_batch / self.request.micro_batch


# ---- seconds of a token


def gpu_read(case: Case) -> float:
    """Seconds of a token's reads of weights and KV cache, all on the GPU."""
    return _token_bytes(case) / case.machine.vram_rate


def cpu_read(case: Case) -> float:
    """Seconds of a token's reads of weights and KV cache, all on the CPU."""
    return _token_bytes(case) / case.machine.ram_rate


def _token_bytes(case: Case) -> float:
    footprint = case.print
    return footprint.token_bytes + footprint.chosen_bytes + footprint.kv_read_bytes(case.request.depth)


def steps(case: Case, layer_s: float) -> float:
    """Seconds of a token's layers beside reading, which dominate in a small model."""
    return case.print.n_layer * layer_s


def gpu_prompt(case: Case) -> float:
    """Seconds of computing a token of the prompt, all on the GPU."""
    return _prompt(case, case.machine.gpu_flops, case.machine.gpu_prompt_layer_s)


def cpu_prompt(case: Case) -> float:
    """Seconds of computing a token of the prompt, all on the CPU."""
    return _prompt(case, case.machine.cpu_flops, case.machine.cpu_prompt_layer_s)


def _prompt(case: Case, rate: float, layer_s: float | None) -> float:
    footprint = case.print
    flops = footprint.token_flops - footprint.output_flops + footprint.expert_flops
    if layer_s is None:
        return (flops + footprint.attention_flops(case.request.prompt_depth)) / rate
    return flops / rate + steps(case, layer_s)


def one_after_another(parts: dict[str, float]) -> Cost:
    """Cost of parts that do not overlap."""
    return Cost(_felt(parts), sum(parts.values()))


def side_by_side(parts: dict[str, float]) -> Cost:
    """Cost of parts that all overlap, so that the longest counts."""
    return Cost(_felt(parts), max(parts.values()))


def in_bunches(computing: dict[str, float], reading: dict[str, float]) -> Cost:
    """Cost of computing and reading that overlap in part, because misses come in bunches.

    The root of the sum of squares.
    """
    seconds = math.hypot(sum(computing.values()), sum(reading.values()))
    return Cost(_felt({**computing, **reading}), seconds)


def _felt(parts: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}
