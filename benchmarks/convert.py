# SPDX-License-Identifier: MIT
"""Speed of `rotary convert` against `cp`, and of paging from the converted model against the original.

Copying compares cp, cp with a sync of its result, and converting, which syncs too and is timed without the
half second in which Python starts. They take turns, each on a quiet disk, with the source in the page cache
and without. Paging compares decode of random tokens with direct reads, in turn.

    python benchmarks/convert.py                            a synthetic model of 2 GiB
    python benchmarks/convert.py MODEL --budget 25%
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it finds only its own folder

from benchmarks.common import MODELS, cpu_name, in_process, synthetic
from benchmarks.disks import drop, fill_cache
from rotary_llamacpp.host.machine import cpu_count
from rotary_llamacpp.units import MIB


def timed(source: str, target: str, verify: bool) -> dict:
    """Convert in this process; returns how many seconds it took."""
    from rotary_llamacpp.conversion.convert import Options, convert

    begin = time.perf_counter()
    convert(source, target, Options(verify=verify))
    return {"seconds": time.perf_counter() - begin}


def ways(source: Path, target: Path) -> dict[str, Callable[[], float]]:
    """The ways to copy, by name: functions that return seconds."""
    plain = ["cp", str(source), str(target)]

    def programs(*commands: list[str]) -> float:
        begin = time.perf_counter()
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - begin

    def ours(verify: bool) -> float:
        return in_process("benchmarks.convert", "timed", str(source), str(target), verify)["seconds"]

    return {
        "cp": lambda: programs(plain),
        "cp, sync": lambda: programs(plain, ["sync", str(target)]),
        "rotary convert": lambda: ours(False),
        "rotary convert --verify": lambda: ours(True),
    }


def quiet(target: Path) -> None:
    """Remove `target` and wait until the disk has nothing left to write."""
    target.unlink(missing_ok=True)
    os.sync()
    time.sleep(1)


def copying(
    source: Path, target: Path, rounds: int, prepare: Callable[[Path], None]
) -> dict[str, list[float]]:
    """MiB/s of each way to copy, by round; `prepare` is called with the source before each."""
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, way in ways(source, target).items():
            quiet(target)
            prepare(source)
            rates.setdefault(name, []).append(source.stat().st_size / MIB / way())
    return rates


def paged(model: str, budget: str, repack: bool, n_decode: int, n_threads: int) -> dict:
    """Time the decode of random tokens, paged by direct reads.

    Returns
    -------
    dict
        ``decode`` in tokens per second, ``read_bandwidth`` in bytes per second, ``bytes_read``,
        ``bytes_paged`` and ``in_place``, the share of the bytes read that needed no copy.
    """
    import numpy as np

    from rotary_llamacpp import Llama

    rotary = {"budget": budget, "store": "direct", "repack": repack, "prefetch": False}
    llama = Llama(
        model,
        rotary=rotary,
        n_ctx=n_decode + 40,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )
    tokens = np.random.default_rng(0).integers(10, llama.n_vocab() - 1, n_decode + 32).tolist()
    for token in tokens[:32]:  # fills the slots
        llama.eval([token])
    llama.rotary_reset_stats()
    begin = time.perf_counter()
    for token in tokens[32:]:
        llama.eval([token])
    seconds = time.perf_counter() - begin
    stats = llama.rotary_stats()
    llama.close()
    return {
        "decode": n_decode / seconds, "read_bandwidth": stats["read_bandwidth"],
        "bytes_read": stats["bytes_read"], "bytes_paged": stats["bytes_paged"],
        "in_place": stats["bytes_in_place"] / stats["bytes_read"],
    }  # fmt: skip


def copy_table(source: Path, target: Path, rounds: int) -> None:
    """Print rates and ratios; a ratio is the median of those of each round, since other load varies."""
    click.echo("| copy, source | MiB/s | of cp | of cp, sync | spread |")
    click.echo("|---|---|---|---|---|")
    for state, prepare in {"in the page cache": fill_cache, "on disk": drop}.items():
        rates = copying(source, target, rounds, prepare)
        for name, each in rates.items():
            ratios = [
                median(ours / theirs for ours, theirs in zip(each, rates[way], strict=True))
                for way in ("cp", "cp, sync")
            ]
            click.echo(
                f"| {name}, {state} | {median(each):.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} "
                f"| {min(each):.0f} to {max(each):.0f} |"
            )


def paging_table(source: Path, target: Path, rounds: int, budget: str, n_decode: int, n_threads: int) -> None:
    """Print the speed of paging from the source and from the converted model."""
    click.echo(
        "| paged by direct reads | decode tok/s | spread | disk MiB/s | MiB read of paged | in place |"
    )
    click.echo("|---|---|---|---|---|---|")
    runs: dict[tuple[str, bool], list[dict]] = {}
    for _ in range(rounds):
        for repack in (False, True):
            for name, path in {"original": source, "converted": target}.items():
                drop(path)
                run = in_process(
                    "benchmarks.convert", "paged", str(path), budget, repack, n_decode, n_threads
                )
                runs.setdefault((name, repack), []).append(run)
    for (name, repack), each in runs.items():
        decode = [run["decode"] for run in each]
        one = each[0]
        click.echo(
            f"| {name}, slots {'repacked' if repack else 'as in the file'} | {median(decode):.1f} "
            f"| {min(decode):.1f} to {max(decode):.1f} "
            f"| {median(run['read_bandwidth'] for run in each) / MIB:.0f} "
            f"| {one['bytes_read'] / MIB:.1f} of {one['bytes_paged'] / MIB:.1f} | {one['in_place']:.0%} |"
        )


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--folder", default=MODELS, type=click.Path(path_type=Path), help="To copy to.")
@click.option("--only", type=click.Choice(["copy", "paging"]), help="One of the two tables.")
@click.option("--budget", default="25%", show_default=True, help="Of the paged runs.")
@click.option("-n", "n_decode", default=64, show_default=True, help="Decoded tokens.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=cpu_count(), show_default="all that may be used")
@click.option("--layers", default=24, show_default=True, help="Of the generated model.")
def main(
    model: Path | None, folder: Path, only: str | None, budget: str, n_decode: int, rounds: int, threads: int,
    layers: int,
) -> None:  # fmt: skip
    source = model or synthetic(MODELS, "test", "q4_0", 0.38, layers=layers, experts=64, embd=1024, ff=768)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-converted.gguf"
    size = source.stat().st_size / MIB
    click.echo(f"{source.name}, {size:.0f} MiB, {threads} cores of {cpu_name()}, medians of {rounds} rounds")
    try:
        if only != "paging":
            copy_table(source, target, rounds)
        if only != "copy":
            quiet(target)
            ways(source, target)["rotary convert"]()
            paging_table(source, target, rounds, budget, n_decode, threads)
    finally:
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
