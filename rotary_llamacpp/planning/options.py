# SPDX-License-Identifier: MIT
"""Options for running a model on a machine, each with its memory and its roofline. Pure: measures nothing.

Decode is modelled by bytes, a token at a time. A device reads weights that are not experts, the chosen
experts and the KV cache at the rate of its own memory. The rest of a layer, attention and starting nodes,
takes time beside that. Missed experts come over the link, by a copy into slots, or from the disk.

- Copies to a GPU count as not overlapped with computation, though prefetch hides a part: a lower estimate.
- Direct reads on the CPU overlap with computation, but misses come in bunches, so neither hides the other
  completely: the root of the sum of squares counts. Reads also take processor time, for the kernel,
  interrupts and a hypervisor.
- Page faults (stock, a model larger than memory) and copies from the page cache into slots do not overlap.

A prompt is computed a micro-batch at a time, at the processor's operations per second; the output matrix
counts for one token. Experts that are not on the computing device are moved once per micro-batch, by Rotary
while it computes, by stock before it computes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import BudgetError
from ..gguf_files.info import LayerInfo
from ..units import MIB, percent, size
from .division import divide
from .hits import uniform
from .roofline import (
    COMPUTE,
    DISK,
    LINK,
    RAM,
    STEPS,
    VRAM,
    Case,
    Cost,
    Request,
    cpu_prompt,
    cpu_read,
    gpu_prompt,
    gpu_read,
    in_bunches,
    one_after_another,
    side_by_side,
    steps,
)  # fmt: skip

ROTARY_GAIN = 1.05  # less than this is not worth another backend
_PERCENT = percent(ROTARY_GAIN - 1, 0)
_FIT_MARGIN = 1024 * MIB  # what llama.cpp's --fit leaves free of a GPU
# Rate at which stock reads by page faults, however fast the disk is, from this project's
# benchmarks/beyond_ram.py (Q8_0, loop device over memory, 35 and 60 % of the model's size: 0.8 and 0.9 GB/s).
_FAULT_RATE = 0.8e9
_PAGEABLE = 1 / 3  # of the link's rate, where memory is not pinned


@dataclass(frozen=True)
class Option:
    """One way to run the model; if it cannot run, `problem` says why and the costs are None."""

    key: str
    name: str
    command: str
    vram_bytes: int = 0
    ram_bytes: int = 0
    decode: Cost | None = None
    prefill: Cost | None = None
    problem: str = ""
    budget_bytes: int | None = None
    n_slots: tuple[int, ...] = ()
    hit_rate: float | None = None
    uniform_hit_rate: float | None = None
    store: str = ""

    @property
    def is_rotary(self) -> bool:
        """Whether this option pages experts."""
        return self.key.startswith("rotary")

    def seconds(self, request: Request) -> float:
        """Seconds of the whole request; infinite where the option cannot run."""
        if self.decode is None or self.prefill is None:
            return math.inf
        return request.prompt * self.prefill.seconds + request.answer * self.decode.seconds


def options(case: Case) -> list[Option]:
    """All ways to run the model that this machine has devices for."""
    found = []
    if case.machine.vram_bytes:
        found.append(_resident(case))
        if found[0].problem and case.print.layers:
            found += [_experts_on_cpu(case, offload=True), _experts_on_cpu(case, offload=False)]
            found.append(_rotary_gpu(case))
        elif found[0].problem:
            found.append(_some_layers(case))
    found.append(_stock_cpu(case))
    if case.print.layers:
        found.append(_rotary_cpu(case))
    return found


def recommend(case: Case, found: Sequence[Option]) -> tuple[Option | None, str]:
    """Pick the best option, and say why in one sentence."""
    best = min(found, key=lambda option: option.seconds(case.request))
    if best.decode is None:
        return None, "do not run this model here: " + "; ".join(f"{o.name}: {o.problem}" for o in found)
    if not case.print.layers:
        return best, "do not use Rotary here: the model has no experts, so there is nothing to page"
    stock = min((o for o in found if not o.is_rotary), key=lambda option: option.seconds(case.request))
    if best.is_rotary:
        if stock.decode is None:
            return best, f"stock llama.cpp cannot run it here ({stock.problem})"
        gain = stock.seconds(case.request) / best.seconds(case.request)
        if gain >= ROTARY_GAIN:
            hits = f"{percent(best.hit_rate, 0)} of the chosen experts are in slots"
            return best, (
                f"{gain:.2f} times as fast as stock's best ({stock.name}) for a prompt of "
                f"{case.request.prompt} tokens and an answer of {case.request.answer}: "
                f"{hits}; decode is limited by {best.decode.limit}, stock's by {stock.decode.limit}"
            )
        best = stock
    if best.key == "resident":
        return best, "do not use Rotary here: everything fits into VRAM"
    if best.key == "cpu" and case.print.weight_bytes <= case.ram_free and not case.machine.vram_bytes:
        return best, "do not use Rotary here: everything fits into memory, and there is no GPU"
    limit = best.decode.limit if best.decode else ""
    return best, (
        f"do not use Rotary here: {best.name} is as fast, within {_PERCENT}, or faster; limited by {limit}"
    )


def at_budgets(case: Case, shares: Sequence[float]) -> list[tuple[float, Option]]:
    """Rotary with these shares of the experts in slots, on the GPU if there is one; only what can run."""
    make = _rotary_gpu if case.machine.vram_bytes else _rotary_cpu
    found = []
    for share in shares:
        option = make(replace(case, budget=f"{100 * share:g}%"))
        if option.decode is not None:
            found.append((share, option))
    return found


# ---- stock


def _resident(case: Case) -> Option:
    needed = case.fixed(windows=True) + case.print.expert_bytes
    option = Option(
        "resident", "everything on the GPU", _llama_cli(case, "-ngl 99"), needed, case.embedding_bytes
    )
    if needed + _FIT_MARGIN > case.machine.vram_bytes:
        return replace(option, problem=_short_of_vram(case, needed))
    return replace(
        option,
        decode=one_after_another({VRAM: gpu_read(case), STEPS: steps(case, case.machine.gpu_layer_s)}),
        prefill=one_after_another({COMPUTE: gpu_prompt(case)}),
    )


def _some_layers(case: Case) -> Option:
    """A dense model with as many layers on the GPU as fit, which llama.cpp's --fit does by default."""
    machine = case.machine
    wanted = case.fixed(windows=True) - case.buffers
    room = machine.vram_bytes - _FIT_MARGIN - case.buffers
    on_gpu = min(1.0, max(room, 0) / max(wanted, 1))
    rest = int((1 - on_gpu) * wanted) + case.embedding_bytes
    option = Option(
        "layers", "some layers on the GPU", _llama_cli(case, ""), int(on_gpu * wanted) + case.buffers, rest
    )
    if rest > case.ram_free:
        return replace(option, problem=_short_of("memory", rest, case.ram_free))

    def both(gpu: float, cpu: float) -> float:
        return on_gpu * gpu + (1 - on_gpu) * cpu

    return replace(
        option,
        decode=one_after_another(
            {
                VRAM: on_gpu * gpu_read(case),
                RAM: (1 - on_gpu) * cpu_read(case),
                STEPS: steps(case, both(machine.gpu_layer_s, machine.cpu_layer_s)),
            }
        ),
        prefill=one_after_another({COMPUTE: both(gpu_prompt(case), cpu_prompt(case))}),
    )


def _experts_on_cpu(case: Case, offload: bool) -> Option:
    """Experts of as few layers as possible on the CPU, from the first layer on, as --n-cpu-moe does."""
    footprint, machine, layers = case.print, case.machine, case.print.layers
    room = machine.vram_bytes - _FIT_MARGIN - case.fixed(windows=True)
    n_cpu = next((n for n in range(len(layers) + 1) if _bytes(layers[n:]) <= room), len(layers))
    # --n-cpu-moe counts layers of the model, dense ones too.
    flag = "--cpu-moe" if n_cpu == len(layers) else f"--n-cpu-moe {layers[n_cpu].il if layers else 0}"
    name = "experts on the CPU, prompts on the GPU" if offload else "experts on the CPU"
    on_cpu = _bytes(layers[:n_cpu])
    left = case.ram_free - case.embedding_bytes
    # Experts that are read instead of mapped are in pinned memory, from which the link copies faster.
    pinned = on_cpu <= left
    flags = f"-ngl 99 {flag}{' -lm none' if pinned else ''}{'' if offload else ' --no-op-offload'}"
    option = Option(
        "op-offload" if offload else "cpu-experts", name, _llama_cli(case, flags),
        case.fixed(windows=True) + _bytes(layers[n_cpu:]),
        min(on_cpu + case.embedding_bytes, max(case.ram_free, 0)),
    )  # fmt: skip
    if room < 0:
        return replace(option, problem=_short_of_vram(case, case.fixed(windows=True)))
    chosen_cpu = _chosen(layers[:n_cpu])
    share = chosen_cpu / max(footprint.chosen_bytes, 1)
    decode = {
        VRAM: gpu_read(case) - chosen_cpu / machine.vram_rate,
        RAM: chosen_cpu / machine.ram_rate,
        STEPS: steps(case, machine.gpu_layer_s) + n_cpu * machine.sync_s,
    }
    faults = _faults(case, layers[:n_cpu], left)
    if faults:
        decode[DISK] = faults
    late = case.per_token(_unread(case, case.touched(0, n_cpu), on_cpu, left))
    if offload:
        prefill = {
            COMPUTE: gpu_prompt(case),
            LINK: case.per_token(case.touched(0, n_cpu)) / (machine.link_rate * (1 if pinned else _PAGEABLE)),
        }
    else:
        experts = footprint.expert_flops * share
        prefill = {COMPUTE: gpu_prompt(case) - experts / machine.gpu_flops + experts / machine.cpu_flops}
    return replace(
        option,
        decode=one_after_another(decode),
        prefill=one_after_another({**prefill, **({DISK: late} if late else {})}),
    )


def _stock_cpu(case: Case) -> Option:
    footprint = case.print
    fixed = case.fixed(windows=True) + case.embedding_bytes
    short = fixed + footprint.expert_bytes > case.ram_free
    # Repacking makes a copy that cannot be dropped and read again, which is fatal with too little memory.
    no_gpu = " -dev none" if case.machine.vram_bytes else ""
    option = Option(
        "cpu", "all on the CPU, mapped", _llama_cli(case, f"-ngl 0{no_gpu}{' --no-repack' if short else ''}"),
        0, min(fixed + footprint.expert_bytes, max(case.ram_free, 0)),
    )  # fmt: skip
    left = case.ram_free - fixed
    if left < 0:
        return replace(option, problem=_short_of("memory", fixed, case.ram_free))
    decode = {RAM: cpu_read(case), STEPS: steps(case, case.machine.cpu_layer_s)}
    faults = _faults(case, footprint.layers, left)
    prefill = {COMPUTE: cpu_prompt(case)}
    if faults:
        decode[DISK] = faults
        prefill[DISK] = case.per_token(_unread(case, case.touched(), footprint.expert_bytes, left))
    return replace(option, decode=one_after_another(decode), prefill=one_after_another(prefill))


def _faults(case: Case, layers: Sequence[LayerInfo], left: int) -> float:
    """Seconds of page faults of a token, where experts of some layers share `left` bytes of page cache."""
    wanted = _bytes(layers)
    if wanted <= left or not layers:
        return 0.0
    slots = _slots_for(case, max(left, 0) / wanted)
    return (1 - case.hits.of(slots)) * _chosen(layers) / min(case.machine.disk_rate, _FAULT_RATE)


def _unread(case: Case, touched: float, stored: int, left: int) -> float:
    """Seconds of reading the experts a micro-batch wants, as far as they do not fit into `left` bytes."""
    absent = 1 - min(1.0, max(left, 0) / max(stored, 1))
    return touched * absent / min(case.machine.disk_rate, _FAULT_RATE)


# ---- Rotary


def _rotary_gpu(case: Case) -> Option:
    footprint, machine = case.print, case.machine
    margin = max(512 * MIB, max(machine.vram_bytes, machine.vram_total) // 10)
    fixed = case.fixed(windows=False)
    option = Option("rotary-gpu", "Rotary on the GPU", _rotary_run(case, ""), fixed, case.embedding_bytes)
    # "auto" takes at least one token's experts, if need be out of the margin.
    free = max(machine.vram_bytes - margin - fixed, footprint.chosen_bytes)
    try:
        slots, budget = divide(case.budget, footprint.layers, free, footprint.name)
    except BudgetError as error:
        return replace(option, problem=str(error))
    if fixed + budget > machine.vram_bytes:
        return replace(option, problem=_short_of("VRAM", fixed + budget, machine.vram_bytes))
    hit = _hit_rate(case, slots)
    missed = (1 - hit) * footprint.chosen_bytes
    in_ram = footprint.expert_bytes + case.embedding_bytes <= case.ram_free
    # By default, experts are pinned if they take three quarters of memory at most; otherwise they are copied,
    # and the host resolves lookups.
    pinned = in_ram and footprint.expert_bytes <= machine.ram_bytes * 3 // 4
    link = machine.link_rate if pinned else min(machine.link_rate, machine.copy_rate)
    syncs = 0 if pinned or hit == 1 else len(footprint.layers)
    decode = {
        VRAM: gpu_read(case),
        STEPS: steps(case, machine.gpu_layer_s) + syncs * machine.sync_s,
        LINK: missed / link,
    }
    absent = case.touched() * (1 - budget / footprint.expert_bytes)
    moved = {COMPUTE: gpu_prompt(case), LINK: case.per_token(absent / link)}
    ram_bytes = footprint.expert_bytes
    if not in_ram:
        # The tier of slots in RAM exists only where experts are whole sectors. Prompts bypass it.
        ram_bytes = max(case.ram_free - case.embedding_bytes, 0) if footprint.whole_sectors else 0
        reads = 1 - hit
        if ram_bytes >= footprint.chosen_bytes:
            tier = _slots_for(case, ram_bytes / footprint.expert_bytes)
            reads = 1 - case.hits.of([max(each) for each in zip(tier, slots, strict=True)])
        decode[DISK] = reads * footprint.chosen_bytes / machine.disk_rate
        moved[DISK] = case.per_token(absent / machine.disk_rate)
    return replace(
        option, decode=one_after_another(decode), prefill=side_by_side(moved), vram_bytes=fixed + budget,
        ram_bytes=ram_bytes + case.embedding_bytes, budget_bytes=budget,
        n_slots=tuple(slots), hit_rate=hit, uniform_hit_rate=uniform(footprint.layers, slots),
        store="memory" if in_ram else "direct",
    )  # fmt: skip


def _rotary_cpu(case: Case) -> Option:
    footprint, machine = case.print, case.machine
    fixed = case.fixed(windows=False) + case.embedding_bytes
    fits = fixed + footprint.expert_bytes <= case.ram_free
    mapped = fits if case.store == "auto" else case.store == "mmap"
    # A staging area for reads in flight: a 24th of memory, 16 to 256 MiB.
    staging = 0 if mapped else min(max(case.machine.ram_bytes // 24, 16 * MIB), 256 * MIB)
    inner = " --inner CPU" if machine.vram_bytes else ""
    inner += f" --store {case.store}" if case.store != "auto" else ""
    option = Option("rotary-cpu", "Rotary on the CPU", _rotary_run(case, inner), 0, fixed)
    free = case.ram_free - fixed - staging
    if not mapped:
        free = max(free, footprint.chosen_bytes)
    try:
        slots, budget = divide(case.budget, footprint.layers, free, footprint.name)
    except BudgetError as error:
        return replace(option, problem=str(error))
    if mapped and not fits:
        return replace(option, problem=_short_of("memory", fixed + footprint.expert_bytes, case.ram_free))
    if fixed + staging + budget > machine.ram_bytes:
        return replace(option, problem=_short_of("memory", fixed + staging + budget, machine.ram_bytes))
    hit = _hit_rate(case, slots)
    missed = (1 - hit) * footprint.chosen_bytes
    computing = {RAM: cpu_read(case), STEPS: steps(case, machine.cpu_layer_s)}
    prompt = cpu_prompt(case)
    absent = case.per_token(case.touched() * (1 - budget / footprint.expert_bytes))
    if mapped:
        decode = one_after_another({**computing, RAM: computing[RAM] + missed / case.fill_rate})
        # Batches of a prompt are computed from the mapping if the layout allows it, whatever is in slots.
        prefill = one_after_another(
            {COMPUTE: prompt, RAM: absent / case.fill_rate if machine.repack_rate else 0.0}
        )
    else:
        # Reading takes processor time too. Experts are read into slots directly, unless they are repacked.
        rewritten = missed / case.fill_rate if machine.repack_rate else 0.0
        computing[STEPS] += missed * machine.disk_cpu_s + rewritten
        decode = in_bunches(computing, {DISK: missed / machine.disk_rate})
        handled = absent * (machine.disk_cpu_s + 1 / case.fill_rate)
        prefill = side_by_side({COMPUTE: prompt + handled, DISK: absent / machine.disk_rate})
    return replace(
        option, decode=decode, prefill=prefill,
        ram_bytes=fixed + staging + budget, budget_bytes=budget, n_slots=tuple(slots), hit_rate=hit,
        uniform_hit_rate=uniform(footprint.layers, slots), store="mmap" if mapped else "direct",
    )  # fmt: skip


def _slots_for(case: Case, share: float) -> list[int]:
    """Slots of each layer for a share of the experts, at least one token's."""
    return [max(layer.n_expert_used, int(share * layer.n_expert)) for layer in case.print.layers]


def _hit_rate(case: Case, slots: Sequence[int]) -> float:
    if all(n == layer.n_expert for n, layer in zip(slots, case.print.layers, strict=True)):
        return 1.0  # filled at the start
    return case.hits.of(slots)


# ---- words


def _bytes(layers: Sequence[LayerInfo]) -> int:
    return sum(layer.layer_bytes for layer in layers)


def _chosen(layers: Sequence[LayerInfo]) -> int:
    return sum(layer.chosen_bytes for layer in layers)


def _short_of(what: str, needed: float, available: int) -> str:
    return f"{size(needed)} of {what} needed, {size(max(available, 0))} available"


def _short_of_vram(case: Case, needed: float) -> str:
    return (
        _short_of("VRAM", needed + _FIT_MARGIN, case.machine.vram_bytes)
        + ", including the GiB that llama.cpp leaves free"
    )


def _llama_cli(case: Case, flags: str) -> str:
    threads = f"-t {case.threads}" if case.threads else ""
    words = ["llama-cli -m", shlex.quote(case.model), flags, threads, f"-c {case.request.n_ctx}"]
    return " ".join(word for word in words if word)


def _rotary_run(case: Case, inner: str) -> str:
    budget = f" --budget {shlex.quote(case.budget)}" if case.budget != "auto" else ""
    threads = f" --threads {case.threads}" if case.threads else ""
    return f'rotary run {shlex.quote(case.model)} -p "..."{budget}{inner}{threads} --ctx {case.request.n_ctx}'
