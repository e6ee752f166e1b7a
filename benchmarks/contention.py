# SPDX-License-Identifier: MIT
"""How reading a fast disk slows computation: stock's decode in memory, alone and beside a plain reader.

Reads from the fast disk of beyond_ram.py, a loop device over memory, are copies by this machine's cores. So a
model that reads its experts from there cannot decode faster than the same model in memory beside a reader of
as many bytes per second. Figures are medians over rounds in turn.

    python benchmarks/contention.py --rate 1100 MODEL      (as root)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it finds only its own folder

from benchmarks.common import cpu_name, in_process
from benchmarks.disks import fast_disk
from rotary_llamacpp.host.machine import cpu_count
from rotary_llamacpp.units import MIB


@contextlib.contextmanager
def reader(path: Path, rate: float) -> Iterator[None]:
    """Read `path` over and over by direct I/O, one MiB at a time, at `rate` bytes per second, meanwhile."""
    ending = threading.Event()

    def read() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        size = os.fstat(fd).st_size // MIB * MIB
        block, start, done = mmap.mmap(-1, MIB), time.monotonic(), 0
        while not ending.is_set():
            os.preadv(fd, [block], done % size)
            done += MIB
            time.sleep(max(0.0, done / rate - (time.monotonic() - start)))
        os.close(fd)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rate", default=1100.0, show_default=True, help="MB/s that are read.")
@click.option("-n", "n_decode", default=128, show_default=True, help="Decoded tokens.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=cpu_count(), show_default="all that may be used")
def main(model: Path, rate: float, n_decode: int, rounds: int, threads: int) -> None:
    figures: dict[str, list[float]] = {"alone": [], "beside a reader": []}
    with fast_disk(model.stat().st_size) as folder:
        copy = Path(shutil.copy(model, folder))
        for _ in range(rounds):
            for name, values in figures.items():
                beside = reader(copy, rate * 1e6) if name != "alone" else contextlib.nullcontext()
                with beside:
                    run = in_process("benchmarks.decode", "measure", str(model), None, 64, n_decode, threads)
                values.append(run["decode"])
                click.echo(f"{name}: {run['decode']:.1f} tok/s", err=True)
    alone, beside_it = (statistics.median(values) for values in figures.values())
    click.echo(f"{cpu_name()}, {threads} threads, {model.name}, medians of {rounds}")
    click.echo(
        f"decode alone {alone:.1f} tok/s; beside {rate:.0f} MB/s {beside_it:.1f}: {beside_it / alone:.2f}"
    )


if __name__ == "__main__":
    main()
