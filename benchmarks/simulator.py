# SPDX-License-Identifier: MIT
"""What the simulator predicts against what runs measure: decode in tokens per second, by budget and policy.

    python benchmarks/simulator.py models/tiny-moe-q8_0.gguf --store mmap

Greedy output is the same whatever is resident, so one recorded routing stands for all runs. Two runs
calibrate the model of time, both with LRU: one whose experts are all there but for one a layer gives the time
of computing, one at the middle budget the link's bandwidth. The others are predicted. Measured in turn,
medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script it finds only its own folder

import click  # noqa: E402

from benchmarks.common import cpu_name, in_process  # noqa: E402

PROMPT = "In the beginning"


def measure(model: str, config: dict[str, Any], n_decode: int, threads: int) -> dict[str, float]:
    """Seconds of decoding n_decode tokens greedily after PROMPT, warm, and the hit rate."""
    from rotary_llamacpp import Llama

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
    return {"seconds": seconds, "hit_rate": stats["hit_rate"], "n_expert": stats["n_expert"]}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--budgets", default="12.5,25,50,75", show_default=True, help="Percent of all experts.")
@click.option("--policies", default="lru,recall", show_default=True)
@click.option("--store", default="mmap", show_default=True)
@click.option("-n", "n_decode", default=200, show_default=True, help="Tokens.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    model: str, budgets: str, policies: str, store: str, n_decode: int, rounds: int, threads: int
) -> None:
    from rotary_llamacpp import RotaryConfig
    from rotary_llamacpp.info import ModelInfo
    from rotary_llamacpp.recording import record
    from rotary_llamacpp.simulation import Link, replay, slots_for

    shares = [float(each) / 100 for each in budgets.split(",")]
    base = {"store": store, "prefetch": False}
    trace = record(model, [PROMPT], n_decode, RotaryConfig(budget="50%", verbose=False, inner="CPU"),
                   temp=0, n_ctx=n_decode + 64, n_threads=threads)  # fmt: skip
    n_expert = max(layer.n_expert for layer in ModelInfo.read(model).layers)
    cells: dict[tuple[Any, str], dict[str, Any]] = {(None, "lru"): {"budget": f"{n_expert - 1} slots"}}
    for share in shares:
        for policy in policies.split(","):
            cells[share, policy] = {"budget": f"{slots_for(trace, share)[0]} slots", "policy": policy}
    runs: dict[Any, list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for cell, config in cells.items():
            job = (model, {**base, "policy": "lru", **config}, n_decode, threads)
            runs[cell].append(in_process("benchmarks.simulator", "measure", *job))
    seconds = {cell: statistics.median(run["seconds"] for run in found) for cell, found in runs.items()}

    compute_us = 1e6 * seconds[None, "lru"] / n_decode
    middle = shares[len(shares) // 2 - 1]
    n_bytes = replay(trace, "lru", slots_for(trace, middle)).n_bytes
    rate = n_bytes / (1e6 * (seconds[middle, "lru"] - seconds[None, "lru"]))
    click.echo(f"{cpu_name()}, {threads} threads; {Path(model).name}, store {store}, {n_decode} tokens")
    click.echo(
        f"computing {compute_us / 1000:.2f} ms a token, link {rate / 1000:.2f} GB/s (at {100 * middle:g} %)\n"
    )
    click.echo("| budget | policy | hit rate | simulated | measured tok/s | simulated | off by |")
    click.echo("|---|---|---|---|---|---|---|")
    for share, policy in [cell for cell in cells if cell[0] is not None]:
        found = replay(trace, policy, slots_for(trace, share), Link(rate, compute_us))
        measured = n_decode / seconds[share, policy]
        predicted = found.tokens_per_second or 0.0
        note = " (calibrates)" if (share, policy) == (middle, "lru") else ""
        hits = runs[share, policy][0]["hit_rate"]
        click.echo(
            f"| {100 * share:g} % | {policy}{note} | {hits:.1%} | {found.hit_rate:.1%} "
            f"| {measured:.1f} | {predicted:.1f} | {predicted / measured - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
