# SPDX-License-Identifier: MIT
"""Rounds of beyond_ram.py: run the variants of each cell, each in a process in a cgroup; keep the figures."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from benchmarks import cgroups, report
from benchmarks.cells import Cell, Variant
from benchmarks.common import ProcessFailed, in_process
from benchmarks.disks import Disk, drop, fill_cache, set_read_ahead

GIVE_UP = 1.5  # stop decoding with stock once it has taken this many times as long as its best so far


@dataclass
class Benchmark:
    """The models and disks to measure, the settings, and all runs so far."""

    models: dict[tuple[str, str], Path]  # by type and kind
    disks: dict[str, Disk]
    job: dict  # fields common to all measurements, see measurement.measure
    budget: str
    read_ahead: list[int | str]
    limit_s: float
    runs: list[dict] = field(default_factory=list)
    repacks: dict[str, bool] = field(default_factory=dict)  # by type: whether repacking changes anything
    failures: list[str] = field(default_factory=list)
    round: int = 0

    # ---- one measurement

    def run(self, cell: Cell, variant: Variant, give_up_s: dict[str, float] | None = None) -> dict:
        """Measure once, keep and return the run.

        Raises
        ------
        click.ClickException
            The logits are not those of stock in memory, or Rotary did not page, or a run without a memory
            limit did not finish, which makes all other runs useless.
        """
        disk = self.disks[cell.disk]
        model = disk.place(self.models[cell.type, cell.kind])
        if cell.memory is None:
            fill_cache(model)
            limit_bytes = throttle = None
        else:
            drop(model)
            limit_bytes, throttle = int(model.stat().st_size * cell.memory), disk.throttle
        if disk.own_read_ahead is not None:
            set_read_ahead(disk.device, variant.read_ahead or disk.own_read_ahead)
        run = self.record(cell, variant) | {"limit_bytes": limit_bytes}
        begin = time.monotonic()
        with cgroups.group(limit_bytes, throttle) as group:
            job = self.job | {
                "model": str(model), "rotary": self.rotary(variant), "repack": variant.repack,
                "groups": group.joined_by, "streams": cell.streams, "give_up_s": give_up_s or {},
            }  # fmt: skip
            try:
                run |= in_process("benchmarks.measurement", "measure", job, timeout=self.limit_s)
            except subprocess.TimeoutExpired:
                run["outcome"] = f"over {self.limit_s:.0f} s"
            except ProcessFailed as error:
                killed = error.returncode == -signal.SIGKILL and group.oom_kills()
                run |= {"outcome": "killed" if killed else "failed", "error": str(error)}
            run["peak_bytes"] = group.peak_bytes()
        run["seconds"] = time.monotonic() - begin
        self.runs.append(run)
        self.say(cell, variant, run)
        self.check(cell, variant, run)
        return run

    def record(self, cell: Cell, variant: Variant) -> dict:
        """The fields that identify a run, with the outcome "measured"."""
        return {
            "cell": str(cell), "type": cell.type, "disk": cell.disk, "memory": cell.memory, "kind": cell.kind,
            **asdict(variant), "round": self.round, "outcome": "measured",
        }  # fmt: skip

    def rotary(self, variant: Variant) -> dict | None:
        """The argument of `Llama` for a variant."""
        if variant.system == "stock":
            return None
        changed = {name: False for name in ("repack", "prefetch") if not getattr(variant, name)}
        return {"budget": self.budget, "verbose": False, **changed}

    def label(self, cell: Cell, variant: Variant) -> str:
        """A run in words."""
        name = variant.name(self.repacks.get(cell.type, True))
        return f"round {self.round}, {cell}: {variant.system}, {name}"

    def say(self, cell: Cell, variant: Variant, run: dict) -> None:
        """Print a line of progress; raises ClickException if a run without a memory limit did not finish."""
        said = run["outcome"]
        if said == "measured":
            rates = [
                f"{name} {s['decode']:.1f}{', given up' if s['cut'] else ''}"
                for name, s in run["streams"].items()
            ]
            said = f"{', '.join(rates)}; prefill {run['prefill']:.0f} tok/s"
        click.echo(f"{self.label(cell, variant)}: {said} ({run['seconds']:.0f} s)", err=True)
        if run["outcome"] != "measured" and cell.memory is None:
            raise click.ClickException(
                f"{self.label(cell, variant)}: {run['outcome']}: {run.get('error', 'raise --limit')}"
            )
        if run["outcome"] == "failed":
            self.failures.append(f"{self.label(cell, variant)}: {run['error']}")
            click.echo(run["error"], err=True)

    def check(self, cell: Cell, variant: Variant, run: dict) -> None:
        """Raise unless the logits are those of stock in memory with the same layout and Rotary pages."""
        references = self.of(
            type=cell.type, kind=cell.kind, memory=None, system="stock", repack=variant.repack,
            outcome="measured",
        )  # fmt: skip
        for stream, figures in run.get("streams", {}).items():
            if variant.system == "rotary" and not figures["stats"]["active"]:
                raise click.ClickException(
                    f"{self.label(cell, variant)}: not paged: {figures['stats']['reason']}"
                )
            for reference in references[:1]:
                expected = reference["streams"][stream]["hash"]
                if figures["hash"] is not None and figures["hash"] != expected:
                    raise click.ClickException(
                        f"{self.label(cell, variant)}: logits of the last token of {stream} hash to "
                        f"{figures['hash']}, those of stock in memory to {expected}; they must be equal"
                    )

    # ---- rounds

    def of(self, **wanted: object) -> list[dict]:
        """The runs so far whose fields have these values."""
        return report.select(self.runs, **wanted)

    def explore(self, cell: Cell) -> None:
        """Run the first round: every variant of stock, both layouts of Rotary, and prefetch off."""
        best_s: dict[str, float] = {}
        for variant in self.stock_variants(cell):
            known = self.known_failure(cell, variant)
            if known:
                outcome = {"outcome": known["outcome"], "inferred": True, "seconds": 0.0}
                self.runs.append(self.record(cell, variant) | outcome)
                continue
            run = self.run(cell, variant, {name: GIVE_UP * seconds for name, seconds in best_s.items()})
            if cell.memory is None:
                continue
            for name, figures in run.get("streams", {}).items():
                seconds = self.job["n_decode"] / figures["decode"]
                best_s[name] = min(seconds, best_s.get(name, seconds))
        if cell.type not in self.repacks:
            runs = self.of(cell=str(cell))
            copied = {run["repack"]: run["anonymous_bytes"] for run in runs}  # repacked weights are a copy
            model_bytes = self.models[cell.type, cell.kind].stat().st_size
            self.repacks[cell.type] = copied[True] - copied[False] > model_bytes / 10
            if not self.repacks[cell.type]:
                for run in runs:
                    run["repack"] = True
        if not cell.shown:
            return
        for repack in (True, False) if self.repacks[cell.type] else (True,):
            self.run(cell, Variant("rotary", repack))
        if cell.memory is not None:
            for best in self.best(cell, "rotary")[:1]:
                self.run(cell, Variant("rotary", best.repack, prefetch=False))

    def stock_variants(self, cell: Cell) -> list[Variant]:
        """Variants of stock for the first round; those that copy the weights come last."""
        if cell.memory is None:
            return [Variant("stock", repack) for repack in self.layouts(cell.type)]
        own = self.disks[cell.disk].own_read_ahead
        if own is None:
            return [Variant("stock", repack) for repack in self.layouts(cell.type)]
        sizes = dict.fromkeys(own if kib == "own" else kib for kib in self.read_ahead)
        return [Variant("stock", repack, kib) for repack in self.layouts(cell.type) for kib in sizes]

    def layouts(self, type_: str) -> tuple[bool, ...]:
        """Values of `Variant.repack` that differ."""
        return (False, True) if self.repacks.get(type_, True) else (True,)

    def known_failure(self, cell: Cell, variant: Variant) -> dict | None:
        """An earlier run that shows that this variant would fail too, or None.

        Copies of the weights that do not fit do not fit at any read-ahead and, if that run was killed, on no
        disk and with no routing.
        """
        if cell.memory is None or not variant.repack or not self.repacks[cell.type]:
            return None
        runs = self.of(type=cell.type, memory=cell.memory, system="stock", repack=True)
        for run in runs:
            if run["outcome"] == "killed" or (run["outcome"].startswith("over") and run["cell"] == str(cell)):
                return run
        return None

    def best(self, cell: Cell, system: str) -> list[Variant]:
        """The one or two variants with the fastest decode of the first stream and the fastest prefill."""
        runs = self.of(cell=str(cell), system=system, prefetch=True)
        found = [report.best(runs, report.decode(cell.streams[0])), report.best(runs, report.prefill)]
        return list(dict.fromkeys(variant for variant, _ in found if variant is not None))

    def kept(self, cell: Cell) -> list[Variant]:
        """Variants of the later rounds: the best, and prefetch off for comparison."""
        off = self.of(cell=str(cell), system="rotary", prefetch=False)
        return [
            *self.best(cell, "stock"),
            *self.best(cell, "rotary"),
            *dict.fromkeys(Variant("rotary", run["repack"], prefetch=False) for run in off),
        ]

    def expected_s(self, cell: Cell) -> float:
        """Seconds that a later round of this cell is expected to take, from the runs so far."""
        seconds = [run["seconds"] for run in self.of(cell=str(cell), outcome="measured")]
        return len(self.kept(cell)) * sum(seconds) / max(len(seconds), 1)

    def all_rounds(self, cells: list[Cell], rounds: int, deadline: float) -> None:
        """Run all rounds; each has every cell once, so that a slow spell of the machine hits all of them."""
        for self.round in range(1, rounds + 1):
            for cell in cells:
                if self.round == 1:
                    self.explore(cell)
                elif not cell.shown:
                    continue
                elif time.monotonic() + self.expected_s(cell) > deadline:
                    click.echo(f"round {self.round} of {rounds} ends here, --minutes are over", err=True)
                    return
                else:
                    for variant in self.kept(cell):
                        self.run(cell, variant)

    def overlaps(self, cells: list[Cell]) -> dict[str, dict[str, float | None]]:
        """Lag-1 overlap of the routing, by model and stream."""
        found = {}
        for cell in cells:
            if cell.memory is None:
                model = str(self.models[cell.type, cell.kind])
                job = self.job | {"model": model, "streams": cell.streams}
                found[f"{cell.type} {cell.kind}"] = in_process("benchmarks.measurement", "overlaps", job)
        return found
