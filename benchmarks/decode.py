# SPDX-License-Identifier: MIT
"""Decode and prefill speed, paged against stock, on this machine.

Each measurement is a process of its own: it loads the model, evaluates a prompt, then decodes greedily. A
round runs every configuration once, so that a slow spell of the machine hits all of them; figures are medians
over rounds, and ratios are to stock with the same kernels, repacking included. All configurations must
generate the same text, or the benchmark fails. Run it on an idle machine: with more runnable threads than
cores, ggml's barriers measure the scheduler.

With --against, another built checkout of this project runs the same configurations in turn with this one.

    python benchmarks/decode.py models/tiny-moe-q8_0.gguf
    python benchmarks/decode.py models/tiny-moe-q8_0.gguf --against ../before
    python benchmarks/decode.py --shape qwen3-30b-a3b --layers 6 --type q4_0 --locality 0.38
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it finds only its own folder

from benchmarks.common import MODELS, ROOT, ProcessFailed, cpu_name, in_process, last_logits, synthetic
from rotary_llamacpp.host.machine import cpu_count


def measure(model: str, budget: str | None, n_prompt: int, n_decode: int, n_threads: int) -> dict:
    """Load `model`, paged with `budget` or stock if it is None, and time prefill and decode.

    Returns
    -------
    dict
        ``prefill`` and ``decode`` in tokens per second, ``text_hash`` of the greedy tokens, ``hit_rate`` of
        the decode (None for stock) and ``n_slots``.
    """
    import numpy as np

    from rotary_llamacpp import Llama

    llama = Llama(
        model, rotary=budget, n_ctx=n_prompt + n_decode + 8, n_batch=512, n_threads=n_threads,
        n_threads_batch=n_threads, verbose=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompt = [int(t) for t in rng.integers(10, llama.n_vocab() - 1, n_prompt)]
    llama.eval(prompt[:8])  # first touch of buffers and threads
    llama.reset()
    start = time.perf_counter()
    llama.eval(prompt)
    prefill = n_prompt / (time.perf_counter() - start)

    llama.rotary_reset_stats()
    tokens = []
    start = time.perf_counter()
    for _ in range(n_decode):
        tokens.append(int(last_logits(llama).argmax()))
        llama.eval(tokens[-1:])
    decode = n_decode / (time.perf_counter() - start)
    stats = llama.rotary_stats()
    llama.close()
    return {
        "prefill": prefill,
        "decode": decode,
        "text_hash": hashlib.sha256(repr(tokens).encode()).hexdigest()[:12],
        "hit_rate": stats["hit_rate"],
        "n_slots": stats["n_slots"],
    }


@click.command()
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--shape", help="Generate a model of this shape instead of reading MODEL.")
@click.option("--type", "type_", default="q4_0", show_default=True, help="Type of its experts.")
@click.option("--layers", default=6, show_default=True, help="Its layers.")
@click.option(
    "--locality", type=float, help="Share of experts the next token uses again; random if left out."
)
@click.option("--budgets", default="100%,50%,25%", show_default=True, help="Paged runs, comma separated.")
@click.option("--prompt", "n_prompt", default=128, show_default=True, help="Prompt tokens.")
@click.option("-n", "n_decode", default=64, show_default=True, help="Decoded tokens.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=cpu_count(), show_default="all that may be used")
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write all figures here as well.")
def main(
    model, shape, type_, layers, locality, budgets, n_prompt, n_decode, rounds, threads, against, json_path
):
    """Print a table of decode and prefill speed, stock and paged."""
    if (model is None) == (shape is None):
        raise click.UsageError("give either a MODEL or --shape")
    path = Path(model).resolve() if model else synthetic(MODELS, shape, type_, locality, layers=layers)
    # By name: the checkout whose code runs, and the budget.
    configurations: dict[str, tuple[Path, str | None]] = {"stock": (ROOT, None)}
    for budget in budgets.split(","):
        configurations[budget] = (ROOT, budget)
        if against:
            configurations[f"{budget} {against.name}"] = (against.resolve(), budget)
    runs: dict[str, list[dict]] = {name: [] for name in configurations}
    for round_ in range(rounds):
        for name, (root, budget) in configurations.items():
            click.echo(f"\rround {round_ + 1} of {rounds}: {name:20}", nl=False, err=True)
            arguments = (str(path), budget, n_prompt, n_decode, threads)
            try:
                runs[name].append(in_process("benchmarks.decode", "measure", *arguments, root=root))
            except ProcessFailed as error:
                raise click.ClickException(f"{name}: failed: {error}") from None
    click.echo("\r" + " " * 50 + "\r", nl=False, err=True)

    hashes = {run["text_hash"] for each in runs.values() for run in each}
    if len(hashes) != 1:
        raise click.ClickException(f"{path.name}: the text differs between configurations: {sorted(hashes)}")

    def median(name: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[name])

    click.echo(f"{path.name}, {cpu_name()}, {threads} threads, medians of {rounds} rounds")
    click.echo("| | decode tok/s | of stock | prefill tok/s | of stock | slots | hit rate |")
    click.echo("|---|---|---|---|---|---|---|")
    table = []
    for name in configurations:
        run = runs[name][0]
        row = {
            "configuration": name, "decode": median(name, "decode"),
            "decode_ratio": median(name, "decode") / median("stock", "decode"),
            "prefill": median(name, "prefill"),
            "prefill_ratio": median(name, "prefill") / median("stock", "prefill"),
            "n_slots": run["n_slots"], "hit_rate": run["hit_rate"],
        }  # fmt: skip
        table.append(row)
        hit_rate = "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
        click.echo(
            f"| {name} | {row['decode']:.1f} | {row['decode_ratio']:.2f} "
            f"| {row['prefill']:.1f} | {row['prefill_ratio']:.2f} | {row['n_slots'] or ''} | {hit_rate} |"
        )
    if against:
        for budget in budgets.split(","):
            decode, prefill = (
                median(budget, figure) / median(f"{budget} {against.name}", figure)
                for figure in ("decode", "prefill")
            )
            click.echo(f"{budget} against {against.name}: decode {decode:.3f}, prefill {prefill:.3f}")
    if json_path:
        everything = {"model": path.name, "table": table, "runs": runs}
        Path(json_path).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
