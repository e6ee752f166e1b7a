# SPDX-License-Identifier: MIT
"""Models larger than memory: decode and prefill speed of stock llama.cpp and of Rotary in a memory cgroup.

Each measurement is a process of its own in a fresh cgroup, with the model dropped from the page cache before;
stock and Rotary take turns. The models are synthetic, a few layers of a real shape, so that bytes read and
computed per token are in a real proportion. Stock runs with its best setting of the disk's read-ahead and of
repacking, Rotary with its defaults. The first round tries every variant, later rounds repeat the best. Logits
must equal those of stock in memory with the same kernels to the bit, or the benchmark fails.

    python benchmarks/beyond_ram.py --json figures.json    # benchmarks/plots.py draws what this writes
    python benchmarks/beyond_ram.py --types q4_0 --routings calibrated --memory 60% --disks machine
    python benchmarks/beyond_ram.py --reader        # only the disks' bandwidth for a plain parallel reader

Needs root: it sets cgroups (v1 or v2), read-ahead and mounts, and restores them unless SIGKILL ends the run.
Disks that the machine does not allow are skipped, with the reason. Run it on an idle machine.

Disks: *machine* is the disk of --dir. *fast* is a loop device over memory and stands for NVMe. *slow* is the
machine's disk throttled and stands for a SATA SSD: a virtual disk served from its host's cache can be as fast
as NVMe.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it finds only its own folder

from benchmarks import cgroups, disks, report
from benchmarks.cells import LOCALITY, plan
from benchmarks.common import MODELS, ProcessFailed, cpu_name, in_process, provenance, synthetic
from benchmarks.disks import Disk
from benchmarks.rounds import Benchmark
from rotary_llamacpp.gguf_files.info import ModelInfo
from rotary_llamacpp.host.machine import available_memory, cpu_count
from rotary_llamacpp.units import MIB

SHAPE = "qwen3-30b-a3b"
OVERRIDES = {"ff": 384, "heads": 16, "vocab": 32000}
LAYERS = {"q4_0": 12, "q8_0": 8}  # 2.3 and 2.8 GB

# For a smoke run: 112 MiB; a limit of 60 % of that still holds the buffers of a small context.
QUICK_SHAPE = "test"
QUICK_OVERRIDES = {"layers": 8, "experts": 128}
QUICK = {
    "types": ["q4_0"], "routings": ["calibrated", "repeat"], "memory": [0.6, None], "rounds": 1, "threads": 1,
    "read_ahead": [128, "own"], "budget": "25%", "n_prompt": 32, "n_warm": 8, "n_decode": 8,
}  # fmt: skip


# ---- the machine ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def teardown() -> Iterator[contextlib.ExitStack]:
    """A stack of clean-ups that also run if a signal ends the run; further signals do not disturb them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in numbers}
    stack = contextlib.ExitStack()
    try:
        yield stack
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        try:
            stack.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def set_up_disks(
    stack: contextlib.ExitStack,
    names: list[str],
    folder: Path,
    fast_bytes: int,
    reserve_bytes: int,
    slow_mib: int,
) -> tuple[dict[str, Disk], dict[str, str]]:
    """Set up the machine's disk and those in `names`; returns the disks, and why others are missing, by name.

    Parameters
    ----------
    fast_bytes : int
        Bytes of files that the fast disk must hold.
    reserve_bytes : int
        Memory that must be available besides.
    """
    device = disks.block_device(folder)
    what = f"{device.name if device else 'no block device'} under {folder}"
    found = {"machine": Disk("machine", what, folder, device)}
    missing = {}
    if "slow" in names:
        throttle = ((device / "dev").read_text().strip(), slow_mib * MIB) if device else None
        reason = cgroups.unavailable(throttle) if throttle else f"{folder} has no block device to throttle"
        if reason:
            missing["slow"] = reason
        else:
            what = f"{device.name} throttled to {slow_mib} MiB/s"
            found["slow"] = Disk("slow", what, folder, device, throttle)
    if "fast" in names:
        try:
            available = available_memory() or 0
            if available < fast_bytes + reserve_bytes:
                raise OSError(
                    f"{available / MIB:.0f} MiB of memory are available; the disk takes "
                    f"{fast_bytes / MIB:.0f} MiB, measuring {reserve_bytes / MIB:.0f} MiB"
                )
            fast = stack.enter_context(disks.fast_disk(fast_bytes))
            what = "ext4 on a loop device over tmpfs"
            found["fast"] = Disk("fast", what, fast, disks.block_device(fast), holds_one=True)
        except OSError as error:
            missing["fast"] = str(error)
    for disk in found.values():
        if disk.device is not None:
            with contextlib.suppress(OSError):  # it cannot be set, in a container for example: left as it is
                own = stack.enter_context(disks.kept_read_ahead(disk.device))
                disks.set_read_ahead(disk.device, own)
                disk.own_read_ahead = own
    return found, missing


def read_plainly(disk: Disk, model: Path, seconds: float) -> None:
    """Measure the disk's bandwidth for a plain reader of the model's file, throttled as the disk is."""
    path = disk.place(model)
    disks.drop(path)
    block_bytes = min(MIB, path.stat().st_size // 8 & -4096)
    with cgroups.group(None, disk.throttle) as group:
        read = in_process(
            "benchmarks.disks", "plain_reader", str(path), seconds, 8, block_bytes, group.joined_by
        )
    disk.bandwidth = read["bandwidth"]


def write_models(
    folder: Path, shape: str, overrides: dict[str, int], types: list[str], routings: list[str]
) -> dict[tuple[str, str], Path]:
    """The models that the routings need, by type and kind."""
    kinds = [kind for kind in LOCALITY if kind in routings or (kind == "calibrated" and "repeat" in routings)]
    models = {}
    for type_, kind in itertools.product(types, kinds):
        sized = {"layers": LAYERS[type_], **overrides}
        models[type_, kind] = synthetic(folder, shape, type_, LOCALITY[kind], **sized)
    return models


# ---- command line -----------------------------------------------------------------------------------------


def split(allowed: tuple[str, ...] | None = None) -> Callable[..., list[str]]:
    """Click callback for a comma-separated list."""

    def parse(_context: object, _parameter: object, value: str) -> list[str]:
        items = list(dict.fromkeys(item.strip() for item in value.split(",") if item.strip()))
        for item in items:
            if allowed and item not in allowed:
                raise click.BadParameter(f"{item!r} is none of {', '.join(allowed)}.")
        if not items:
            raise click.BadParameter("nothing is chosen.")
        return items

    return parse


def parse_memory(context: object, parameter: object, value: str) -> list[float | None]:
    """Click callback: shares of the model's size; None stands for "fits"."""
    shares: list[float | None] = []
    for item in split()(context, parameter, value):
        try:
            share = None if item == "fits" else float(item.removesuffix("%")) / 100
        except ValueError:
            raise click.BadParameter(f"{item!r} is no share; give 60%, say, or fits.") from None
        if share is not None and not 0 < share < 1:
            raise click.BadParameter(f"{item!r} is not between 0% and 100%; fits is without a limit.")
        shares.append(share)
    return shares


def parse_read_ahead(context: object, parameter: object, value: str) -> list[int | str]:
    """Click callback: numbers of KiB, or "own"."""
    items = split()(context, parameter, value)
    for item in items:
        if item != "own" and not (item.isdigit() and int(item)):
            raise click.BadParameter(f"{item!r} is no number of KiB; give 128, say, or own.")
    return [item if item == "own" else int(item) for item in items]


@click.command()
@click.option("--types", default="q4_0,q8_0", show_default=True, callback=split(tuple(LAYERS)))
@click.option(
    "--routings", default="calibrated,random,repeat", show_default=True,
    callback=split(("calibrated", "random", "repeat")),
    help="As local as a real model's; hardly local; a cycle of 8 tokens, nearly all hits.",
)  # fmt: skip
@click.option(
    "--memory", default="60%,35%,fits", show_default=True, callback=parse_memory,
    help="Limits as shares of the model's size; fits: none.",
)  # fmt: skip
@click.option(
    "--disks", "names", default="machine,fast,slow", show_default=True,
    callback=split(("machine", "fast", "slow")),
)  # fmt: skip
@click.option("--every", is_flag=True, help="Every combination; otherwise those that differ most.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--minutes", default=40.0, show_default=True, help="Later rounds end when this would be over.")
@click.option("-n", "n_decode", default=48, show_default=True, help="Decoded tokens that are timed.")
@click.option("--warm", "n_warm", default=16, show_default=True, help="Decoded tokens before these.")
@click.option("--prompt", "n_prompt", default=512, show_default=True, help="Prompt tokens.")
@click.option("--threads", default=cpu_count(), show_default="all that may be used")
@click.option("--budget", default="auto", show_default=True, help="Rotary's.")
@click.option(
    "--read-ahead", default="128,1024,own", show_default=True, callback=parse_read_ahead,
    help="KiB that stock is tried with; own: what the disk has.",
)  # fmt: skip
@click.option("--slow-mib", default=500, show_default=True, help="MiB/s of the slow disk.")
@click.option("--limit", "limit_s", default=240.0, show_default=True, help="Seconds for one measurement.")
@click.option(
    "--dir", "folder", default=MODELS, type=click.Path(file_okay=False, path_type=Path),
    help="Where the models lie, 10 GB of them.  [default: build/bench]",
)  # fmt: skip
@click.option("--reader", is_flag=True, help="Measure only what a plain parallel reader gets from the disks.")
@click.option("--quick", is_flag=True, help="Smoke run with a tiny model; its figures mean nothing.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all figures here as well.",
)
def main(**options):
    """Print tables of stock and Rotary in less memory than the model has, and which targets are met."""
    deadline = time.monotonic() + 60 * options["minutes"]
    shape, overrides, quick = SHAPE, OVERRIDES, options["quick"]
    if quick:
        options |= QUICK
        shape, overrides = QUICK_SHAPE, QUICK_OVERRIDES
    folder, types, names = options["folder"].resolve(), options["types"], options["names"]
    reason = cgroups.unavailable()
    if reason:
        click.echo(f"skipped: {reason}", err=True)
        return
    try:
        with teardown() as stack:
            stack.callback(cgroups.remove)
            click.echo(f"models in {folder}", err=True)
            models = write_models(folder, shape, overrides, types, options["routings"])
            largest = max(path.stat().st_size for path in models.values())
            found, missing = set_up_disks(
                stack, names, folder, largest, 2 * largest + 1024 * MIB, options["slow_mib"]
            )
            for name, why in missing.items():
                click.echo(f"{name} disk skipped: {why}", err=True)
            used = [found[name] for name in names if name in found]
            for disk in used:
                read_plainly(disk, next(iter(models.values())), 0.3 if quick else 3.0)
                said = f"{disk.name} disk: plain reader {disk.bandwidth / MIB:.0f} MiB/s ({disk.what})"
                click.echo(said, err=not options["reader"])
            if used and not options["reader"]:
                failures = benchmark(options, models, found, missing, [disk.name for disk in used], deadline)
    except (OSError, ProcessFailed, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if used and not options["reader"] and failures:
        raise click.ClickException(f"{len(failures)} measurements failed: {'; '.join(failures)}")


def shape_of(model: Path) -> dict:
    """Figures of a model for captions."""
    info = ModelInfo.read(model)
    names = ("name", "n_layer", "n_expert", "n_expert_used", "expert_bytes")
    return {name: getattr(info, name) for name in names}


def benchmark(
    options: dict, models: dict[tuple[str, str], Path], found: dict[str, Disk], missing: dict[str, str],
    names: list[str], deadline: float,
) -> list[str]:  # fmt: skip
    """Measure, print and write; returns what failed."""
    job = {name: options[name] for name in ("n_prompt", "n_warm", "n_decode")} | {
        "n_threads": options["threads"]
    }
    bench = Benchmark(models, found, job, options["budget"], options["read_ahead"], options["limit_s"])
    cells = plan(options["types"], options["routings"], options["memory"], names, options["every"])
    everything = {
        **provenance(),
        "machine": {
            "cpu": cpu_name(),
            "kernel": platform.release(),
            "n_threads": options["threads"],
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        },
        "settings": {name: value for name, value in options.items() if name not in ("folder", "json_path")},
        "disks": {disk.name: {"what": disk.what, "bandwidth": disk.bandwidth} for disk in found.values()},
        "skipped": missing,
        "models": {f"{type_} {kind}": path.stat().st_size for (type_, kind), path in models.items()},
        "shapes": {type_: shape_of(path) for (type_, _), path in models.items()},
        "cells": [{"name": str(cell), **asdict(cell)} for cell in cells],
        "runs": bench.runs,
    }
    try:
        everything["overlap"] = bench.overlaps(cells)
        bench.all_rounds(cells, options["rounds"], deadline)
        everything["repacks"] = bench.repacks
        everything["rows"] = report.rows(everything)
        everything["targets"] = [] if options["quick"] else report.targets(everything["rows"])
        for line in report.lines(everything):
            click.echo(line)
    finally:
        if options["json_path"]:
            options["json_path"].write_text(json.dumps(everything, indent=1))
    return bench.failures


if __name__ == "__main__":
    main()
