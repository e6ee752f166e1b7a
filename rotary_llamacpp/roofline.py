# SPDX-License-Identifier: MIT
"""A model, a machine and a request, and what a token costs by the bytes and operations it takes. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import MIB
from .footprint import Footprint
from .hits import Hits

VRAM, LINK, RAM, DISK, COMPUTE, STEPS = "VRAM", "link", "RAM", "disk", "compute", "steps"
_STEPS_PER_LAYER = 35  # graph nodes of a layer that compute something: qwen3moe in the pinned llama.cpp


@dataclass(frozen=True)
class Machine:
    """Capacities in bytes, rates in bytes or operations per second, and where each rate comes from."""

    vram_bytes: int
    ram_bytes: int
    vram_rate: float
    link_rate: float
    ram_rate: float  # weights through the CPU's kernels, one token at a time
    copy_rate: float  # into slots, all threads
    disk_rate: float
    gpu_flops: float
    cpu_flops: float
    gpu_step_s: float = 0.0  # starting one node of a graph
    cpu_step_s: float = 0.0
    repacks: bool = False  # the CPU's kernels want the experts in another layout than the file's
    sources: dict[str, str] | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of the model, in tokens; decode is judged in the middle of prompt, answer and context."""

    n_ctx: int = 4096
    prompt: int = 512
    answer: int = 128
    n_ubatch: int = 512

    @property
    def depth(self) -> int:
        """Tokens in the KV cache while the answer is decoded, on average."""
        return min(self.n_ctx, self.prompt + self.answer // 2)


@dataclass(frozen=True)
class Cost:
    """Seconds of a token, by what they go to. `seconds` is less than the sum where things overlap."""

    parts: dict[str, float]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1 / self.seconds

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True)
class Case:
    """A model on a machine."""

    model: str  # path, for commands
    print: Footprint
    machine: Machine
    request: Request
    hits: Hits
    budget: str = "auto"
    store: str = "auto"
    threads: int | None = None  # of the CPU, for commands

    @property
    def ram_free(self) -> int:
        """Memory less the margin that Rotary leaves free: a 24th, at least 64 MiB."""
        return self.machine.ram_bytes - max(64 * MIB, self.machine.ram_bytes // 24)

    @property
    def buffers(self) -> int:
        """Computation's, estimated: logits and eight hidden states of a micro-batch, in F32."""
        return self.request.n_ubatch * 4 * (self.print.n_vocab + 8 * self.print.n_embd)

    @property
    def embedding_bytes(self) -> int:
        """Weights that stay in host memory whatever computes."""
        return self.print.resident_bytes - self.print.token_bytes

    def fixed(self, windows: bool) -> int:
        """On the device that computes: weights that are not experts, KV cache, buffers."""
        return self.print.token_bytes + self.print.kv_bytes(self.request.n_ctx, windows) + self.buffers

    def touched(self, first: int = 0, last: int | None = None) -> float:
        """Bytes of the experts of some layers that a micro-batch of the prompt wants at least once."""
        n_tokens = min(self.request.prompt, self.request.n_ubatch)
        return sum(
            layer.layer_bytes * (1 - (1 - layer.n_expert_used / layer.n_expert) ** n_tokens)
            for layer in self.print.layers[first:last]
        )

    def per_token(self, micro_batch: float) -> float:
        """A token's share of what is done once per micro-batch of the prompt."""
        return micro_batch / min(self.request.prompt, self.request.n_ubatch)


# ---- seconds of a token


def gpu_read(case: Case) -> float:
    """A token's reads of weights and KV cache, all on the GPU."""
    return _token_bytes(case) / case.machine.vram_rate


def cpu_read(case: Case) -> float:
    """The same, all on the CPU."""
    return _token_bytes(case) / case.machine.ram_rate


def _token_bytes(case: Case) -> float:
    footprint = case.print
    return footprint.token_bytes + footprint.chosen_bytes + footprint.kv_read_bytes(case.request.depth)


def _prompt_flops(case: Case) -> float:
    footprint = case.print
    return footprint.token_flops - footprint.output_flops + footprint.expert_flops


def steps(case: Case, step_s: float) -> float:
    """Starting the nodes of a token's graph one after the other: what a small model's time goes to."""
    return case.print.n_layer * _STEPS_PER_LAYER * step_s


def gpu_prompt(case: Case) -> float:
    """Computing a token of the prompt, all on the GPU."""
    return _prompt_flops(case) / case.machine.gpu_flops


def cpu_prompt(case: Case) -> float:
    """The same, all on the CPU."""
    return _prompt_flops(case) / case.machine.cpu_flops


def one_after_another(parts: dict[str, float]) -> Cost:
    """Nothing overlaps."""
    return Cost(_felt(parts), sum(parts.values()))


def side_by_side(parts: dict[str, float]) -> Cost:
    """All overlap: the longest counts."""
    return Cost(_felt(parts), max(parts.values()))


def in_bunches(computing: dict[str, float], reading: dict[str, float]) -> Cost:
    """They overlap, but now this one is longer and now that: the root of the sum of squares."""
    seconds = math.hypot(sum(computing.values()), sum(reading.values()))
    return Cost(_felt({**computing, **reading}), seconds)


def _felt(parts: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}
