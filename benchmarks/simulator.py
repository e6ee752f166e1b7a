# SPDX-License-Identifier: MIT
"""Decode speed predicted by the simulator against measured speed, by budget and policy.

    python benchmarks/simulator.py models/tiny-moe-q8_0.gguf --store mmap
    python benchmarks/simulator.py model.gguf --store direct --throttle 500 --ahead none,router  # as root

Greedy output does not depend on which experts are resident, so that one recorded routing serves all runs.
Three runs with LRU and without prefetch calibrate the model of time: one with the smallest budget, one with a
medium budget, one with all experts but one per layer. They give the time to compute a token, the time of a
lookup that waits, and the link's bandwidth. All other runs are predicted. A trace cannot apply routers; their
accuracy is taken from the run. Runs take turns, figures are medians. --throttle limits the disk, in MiB/s,
and sets the link's bandwidth.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script it finds only its own folder

import click  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.cgroups import group, join  # noqa: E402
from benchmarks.common import cpu_name, in_process  # noqa: E402
from benchmarks.disks import block_device  # noqa: E402
from rotary_llamacpp.simulation import Outcome  # noqa: E402
from rotary_llamacpp.units import MIB  # noqa: E402

PROMPT = "In the beginning"


def measure(
    model: str, config: dict[str, Any], n_decode: int, threads: int, groups: list[str]
) -> dict[str, float]:
    """Time greedy decode of `n_decode` tokens after PROMPT in `groups`; returns seconds and hit rate too."""
    from rotary_llamacpp import Llama

    join(groups)
    llama = Llama(
        model, rotary={**config, "verbose": False}, n_ctx=n_decode + 64, verbose=False, n_gpu_layers=0,
        n_threads=threads, n_threads_batch=threads,
    )  # fmt: skip
    tokens = llama.tokenize(PROMPT.encode(), add_bos=bool(llama._model.add_bos_token()))
    llama.eval(tokens)
    llama.rotary_reset_stats()
    start = time.perf_counter()
    for _ in range(n_decode):
        llama.eval([llama.sample(temp=0)])
    seconds = time.perf_counter() - start
    stats = llama.rotary_stats()
    llama.close()
    return {
        "seconds": seconds, "hit_rate": stats["hit_rate"], "n_expert": stats["n_expert"],
        "right": stats["predicted_right"] / max(stats["predicted"], 1),
    }  # fmt: skip


def calibrate(found: list[Outcome], us: list[float], us_a_byte: float | None) -> list[float]:
    """Fit the microseconds of a token, a wait and a byte, none of them negative, to measured times."""
    if us_a_byte is not None:
        rest = [each_us - each.n_bytes * us_a_byte for each_us, each in zip(us, found, strict=True)]
        return [*_explain([[each.tokens, each.waits] for each in found], rest), us_a_byte]
    return _explain([[each.tokens, each.waits, each.n_bytes] for each in found], us)


def _explain(counts: list[list[int]], us: list[float]) -> list[float]:
    rows = np.array(counts, float)
    scale, kept = rows.max(axis=0), list(range(rows.shape[1]))
    fit = np.zeros(rows.shape[1])
    while kept:
        fit[:] = 0
        fit[kept] = np.linalg.lstsq((rows / scale)[:, kept], np.array(us), rcond=None)[0]
        if (fit >= 0).all():
            break
        kept.remove(int(fit.argmin()))
    return (fit / scale).tolist()


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--budgets", default="12.5,25,50,75", show_default=True, help="Percent of all experts.")
@click.option("--policies", default="lru,recall", show_default=True)
@click.option("--store", default="mmap", show_default=True)
@click.option("--throttle", type=int, help="MiB/s of the disk.")
@click.option("--ahead", default="none", show_default=True, help="none, or predictors; direct store.")
@click.option("--depth", default=2, show_default=True, help="Layers ahead, simulated.")
@click.option("-n", "n_decode", default=200, show_default=True, help="Tokens.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    model: str, budgets: str, policies: str, store: str, throttle: int | None, ahead: str, depth: int,
    n_decode: int, rounds: int, threads: int,
) -> None:  # fmt: skip
    from rotary_llamacpp import RotaryConfig
    from rotary_llamacpp.gguf_files.info import ModelInfo
    from rotary_llamacpp.predictors import Router
    from rotary_llamacpp.runtime.recording import record
    from rotary_llamacpp.simulation import Link, predictor, replay, slots_for

    shares = [float(each) / 100 for each in budgets.split(",")]
    base = {"store": store, "prefetch": False, "split": "even"}
    trace = record(model, [PROMPT], n_decode, RotaryConfig(budget="50%", verbose=False, inner="CPU"),
                   temp=0, n_ctx=n_decode + 64, n_threads=threads)  # fmt: skip
    n_expert = max(layer.n_expert for layer in ModelInfo.read(model).layers)
    cells: dict[tuple[Any, str, str], dict[str, Any]] = {
        (None, "lru", "none"): {"budget": f"{n_expert - 1} slots"}
    }
    for share, policy, named in itertools.product(shares, policies.split(","), ahead.split(",")):
        config = {"budget": f"{slots_for(trace, share)[0]} slots", "policy": policy}
        cells[share, policy, named] = {**config, "prefetch": False if named == "none" else named}
    runs: dict[Any, list[dict[str, float]]] = {cell: [] for cell in cells}
    with contextlib.ExitStack() as stack:
        groups: list[str] = []
        if throttle is not None:
            disk = block_device(Path(model))
            if disk is None:
                raise click.ClickException(f"{model}: on no disk that can be throttled; move it to one")
            number = (disk / "dev").read_text().strip()
            groups = stack.enter_context(group(throttle=(number, throttle * MIB))).joined_by
        for _ in range(rounds):
            for cell, config in cells.items():
                job = (model, {**base, "policy": "lru", **config}, n_decode, threads, groups)
                runs[cell].append(in_process("benchmarks.simulator", "measure", *job))
    seconds = {cell: statistics.median(run["seconds"] for run in found) for cell, found in runs.items()}

    calibrating: dict[tuple[Any, str, str], int] = {(None, "lru", "none"): n_expert - 1}
    for share in (shares[0], shares[len(shares) // 2 - 1]):
        calibrating[share, "lru", "none"] = slots_for(trace, share)[0]
    compute_us, latency_us, us_a_byte = calibrate(
        [replay(trace, "lru", [slots] * len(trace.layers)) for slots in calibrating.values()],
        [1e6 * seconds[cell] for cell in calibrating],
        None if throttle is None else 1e6 / (throttle * MIB),
    )
    link = Link(1 / max(us_a_byte, 1e-9), compute_us, latency_us)
    click.echo(f"{cpu_name()}, {threads} threads; {Path(model).name}, store {store}, {n_decode} tokens")
    click.echo(
        f"computing {compute_us / 1000:.2f} ms a token, {latency_us:.0f} us a wait, "
        f"{1e-3 / us_a_byte if us_a_byte else float('inf'):.2f} GB/s\n"
    )
    click.echo("| budget | policy | ahead | hit rate | simulated | measured tok/s | simulated | off by |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for cell in [cell for cell in cells if cell[0] is not None]:
        share, policy, named = cell
        its = None if named == "none" else predictor(trace, named)
        if isinstance(its, Router):
            its.accuracy = statistics.median(run["right"] for run in runs[cell])
        found = replay(trace, policy, slots_for(trace, share), link, its, depth)
        measured = n_decode / seconds[cell]
        predicted = found.tokens_per_second or 0.0
        note = " (calibrates)" if cell in calibrating else ""
        hits = runs[cell][0]["hit_rate"]
        click.echo(
            f"| {100 * share:g} % | {policy}{note} | {named} | {hits:.1%} | {found.hit_rate:.1%} "
            f"| {measured:.1f} | {predicted:.1f} | {predicted / measured - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
