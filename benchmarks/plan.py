# SPDX-License-Identifier: MIT
"""Speed predicted by ``rotary plan --measure`` against measured speed, on this machine's CPU.

    python benchmarks/plan.py model.gguf

Runs stock, and Rotary by budget, with the model in the page cache and with direct reads. Each round
calibrates in a process of its own, as ``--measure`` does, and then runs every configuration once; predictions
use the median rates, measurements are medians. A run during which other processes took more than --others of
the processors is repeated, but not in a container, where that cannot be seen. Predictions use the default
curve of hit rates; the last column predicts decode from the measured hit rate, to tell the two errors apart.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it finds only its own folder

import click

from benchmarks.common import ProcessFailed, cpu_name, in_process
from benchmarks.disks import fill_cache
from rotary_llamacpp.host.machine import busy_seconds, cpu_count
from rotary_llamacpp.planning import plan as plans
from rotary_llamacpp.planning.hits import Hits
from rotary_llamacpp.planning.options import Option, options

RATES = (
    "ram_rate",
    "copy_rate",
    "disk_rate",
    "cpu_flops",
    "cpu_layer_s",
    "cpu_prompt_layer_s",
    "disk_cpu_s",
    "repack_rate",
)


def calibrate(model: str, threads: int) -> dict[str, Any]:
    """The machine's rates as ``--measure`` finds them."""
    return asdict(plans.make(model, vram="0", measure=True, threads=threads).case.machine)


def predict(
    model: str, rates: dict[str, float], run: dict[str, Any], budget: str | None, store: str, n: int, m: int
) -> tuple[Option, Option]:
    """The planned option, with the expected hit rate and with the measured one."""
    plan = plans.make(
        model, vram="0", budget=budget or "auto", store=store, n_ctx=n + m + 8, prompt=n, answer=m
    )
    case = replace(plan.case, machine=replace(plan.case.machine, **rates))
    key = "rotary-cpu" if budget else "cpu"
    found = next(option for option in options(case) if option.key == key)
    known = replace(case, hits=Hits(lambda _: run["hit_rate"] or 1.0, "the run"))
    return found, next(option for option in options(known) if option.key == key)


def undisturbed(others_share: float, module: str, function: str, *arguments: object) -> dict[str, Any]:
    """Call `in_process`, up to 20 times, until others take no more than `others_share` of the processors."""
    allowed = others_share * cpu_count()
    for _ in range(20):
        _wait_for_idle(allowed)
        busy, ours, begin = busy_seconds(), _child_seconds(), time.monotonic()
        result = in_process(module, function, *arguments)
        after = busy_seconds()
        if busy is None or after is None:
            return result
        others = after - busy - (_child_seconds() - ours)
        if others < allowed * (time.monotonic() - begin):
            return result
        click.echo(f"\r{others:.1f} s of other processes, again ", nl=False, err=True)
    raise click.ClickException("other processes kept the processors busy; run it on an idle machine")


def _wait_for_idle(allowed: float, seconds: float = 1800, sample: float = 3) -> None:
    """Wait until at most `allowed` processors are busy during a sample, or give up after `seconds`."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        busy = busy_seconds()
        if busy is None:
            return
        time.sleep(sample)
        if (busy_seconds() or 0.0) - busy < allowed * sample:
            return


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--budgets", default="100%,50%,25%,12.5%", show_default=True)
@click.option("--stores", default="mmap,direct", show_default=True)
@click.option("--prompt", "n_prompt", default=512, show_default=True, help="Prompt tokens.")
@click.option("-n", "n_decode", default=64, show_default=True, help="Decoded tokens.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=cpu_count(), show_default="all that may be used")
@click.option("--others", default=0.05, show_default=True, help="Share of the processors others may take.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write all figures here as well.")
def main(
    model: str, budgets: str, stores: str, n_prompt: int, n_decode: int, rounds: int, threads: int,
    others: float, json_path: str | None,
) -> None:  # fmt: skip
    cells: list[tuple[str | None, str]] = [(None, "mmap")]
    cells += [(budget, store) for store in stores.split(",") for budget in budgets.split(",")]
    runs: dict[tuple[str | None, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
    machines = []
    for round_ in range(rounds):
        try:
            machines.append(undisturbed(others, "benchmarks.plan", "calibrate", model, threads))
            for cell in cells:
                click.echo(f"\rround {round_ + 1} of {rounds}: {cell}    ", nl=False, err=True)
                config = {"budget": cell[0], "store": cell[1], "verbose": False} if cell[0] else None
                arguments = (model, config, n_prompt, n_decode, threads)
                if cell[1] == "mmap":
                    fill_cache(Path(model))  # direct reads leave nothing there, and a run would start slower
                runs[cell].append(undisturbed(others, "benchmarks.decode", "measure", *arguments))
        except ProcessFailed as error:
            raise click.ClickException(f"failed: {error}") from None
    click.echo("\r" + " " * 50 + "\r", nl=False, err=True)
    rates = {name: statistics.median(machine[name] for machine in machines) for name in RATES}
    click.echo(f"{Path(model).name}, {cpu_name()}, {threads} threads, medians of {rounds} rounds")
    click.echo(
        f"calibrated: weights {rates['ram_rate'] / 1e9:.1f} GB/s, copies {rates['copy_rate'] / 1e9:.1f}, "
        f"disk {rates['disk_rate'] / 1e9:.1f} for {1e9 * rates['disk_cpu_s']:.2f} s/GB of each processor, "
        f"{rates['cpu_flops'] / 1e9:.0f} Gflop/s; a layer's rest takes {1e6 * rates['cpu_layer_s']:.0f} us, "
        f"{1e6 * rates['cpu_prompt_layer_s']:.0f} of a prompt's token\n"
    )
    click.echo(
        "| configuration | hit rate | expected | decode tok/s | predicted | off by | prompt tok/s "
        "| predicted | off by | decode by its hit rate |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    for budget, store in cells:
        run = {
            name: statistics.median(each[name] or 1.0 for each in runs[budget, store])
            for name in ("decode", "prefill", "hit_rate")
        }
        found, known = predict(model, rates, run, budget, store, n_prompt, n_decode)
        hits = f"{run['hit_rate']:.1%} | {found.hit_rate:.1%}" if budget else " | "
        click.echo(
            f"| {f'{budget}, {store}' if budget else 'stock'} | {hits} "
            f"| {_beside(run['decode'], found.decode.rate)} | {_beside(run['prefill'], found.prefill.rate)} "
            f"| {known.decode.rate / run['decode'] - 1:+.0%} |"
        )
    if json_path:
        figures = {f"{budget or 'stock'}, {store}": each for (budget, store), each in runs.items()}
        Path(json_path).write_text(json.dumps({"machines": machines, "runs": figures}, indent=1))


def _beside(measured: float, predicted: float) -> str:
    return f"{measured:.1f} | {predicted:.1f} | {predicted / measured - 1:+.0%}"


if __name__ == "__main__":
    main()
