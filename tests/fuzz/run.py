# SPDX-License-Identifier: MIT
"""Give damaged inputs to every reader, and report those that are not accepted or refused in one line.

    python -m tests.fuzz.run [--cases 10000] [--seed 1] [--only gguf,traces] [--jobs 2]
    python -m tests.fuzz.run --seed 1 --only gguf --case 4711     # one case again, in this process

A case is drawn from the seed, the target's name and its number, so that each can be repeated alone. Workers
are processes of limited memory that handle many cases. A worker that takes too long with a case, or dies of
it, is replaced by one that continues with the next case. Exit status: 0 no fault, 1 faults.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from tests.support import ROOT

SECONDS = 30.0  # limit for one case; on an idle machine none takes a tenth of a second
BYTES = 2 << 30  # address space that a worker may add after its start
MAX_FAULTS = 25  # different faults of a target after which it ends

NAMES = ("gguf", "load", "traces", "profiles", "journals", "budgets", "environment")


def rng_of(seed: int, name: str, number: int) -> Random:
    """The generator that a case is drawn from."""
    return Random(f"{seed}/{name}/{number}")


# ---- worker ------------------------------------------------------------------------------------------


def work(name: str, seed: int, first: int, end: int, folder: Path) -> None:
    """Handle cases in a worker; prints a line of JSON at the beginning and at the end of each."""
    from tests.fuzz.targets import TARGETS

    say = os.fdopen(os.dup(1), "w", buffering=1)  # click's runner and native code may write to stdout itself
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    target = TARGETS[name](folder)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + BYTES, has + BYTES))
    for number in range(first, end):
        print(json.dumps(["begin", number]), file=say)
        try:
            outcome: Any = target.case(rng_of(seed, name, number))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [
                f"{Path(at.filename).name}:{at.lineno}" for at in where if "rotary_llamacpp" in at.filename
            ]
            outcome = ["fault", type(error).__name__, " ".join(str(error).split())[:300], " ".join(ours[-3:])]
        print(json.dumps(["end", number, outcome]), file=say)
    print(json.dumps(["done"]), file=say)


# ---- driver ------------------------------------------------------------------------------------------


class Run:
    """All cases of one target."""

    def __init__(self, name: str, seed: int, cases: int, folder: Path) -> None:
        self.name, self.seed, self.cases, self.folder = name, seed, cases, folder
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()  # by a text that similar faults share
        self.seconds = 0.0

    def run(self) -> Run:
        begin = time.monotonic()
        first = 0
        while first < self.cases and len(self.faults) < MAX_FAULTS:
            first = self._worker(first)
        self.seconds = time.monotonic() - begin
        return self

    def _worker(self, first: int) -> int:
        """Start a worker and follow its output; returns the number of the case to continue with."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            command = [
                sys.executable, "-m", "tests.fuzz.run", "--worker", self.name, "--seed", str(self.seed),
                "--first", str(first), "--cases", str(self.cases), "--folder", folder,
            ]  # fmt: skip
            with subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            ) as process:
                try:
                    return self._listen(process, first)
                finally:
                    process.kill()

    def _listen(self, process: subprocess.Popen[bytes], first: int) -> int:
        assert process.stdout is not None and process.stderr is not None
        current = first - 1
        rest, said = b"", b""
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(SECONDS + (60 if current < first else 0))
            if not ready:
                self._fault(max(current, first), f"hangs: nothing for {SECONDS:.0f} s")
                return max(current, first) + 1
            for key, _ in ready:
                raw = os.read(key.fd, 1 << 16)
                if not raw:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    said = (said + raw)[-4000:]
                else:
                    *lines, rest = (rest + raw).split(b"\n")
                    for line in lines:
                        what, *more = json.loads(line)
                        if what == "done":
                            return self.cases
                        current = more[0]
                        if what == "end":
                            self._count(*more)
                            if len(self.faults) >= MAX_FAULTS:
                                return self.cases
        status = process.wait()
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        if current < first:
            raise SystemExit(f"{self.name}: could not begin, {how}: {said.decode(errors='replace')}")
        self._fault(current, f"{how}: {said.decode(errors='replace')[-300:]}")
        return current + 1

    def _count(self, number: int, outcome: Any) -> None:
        if isinstance(outcome, list):
            self._fault(number, " | ".join(outcome[1:]))
        else:
            self.counts[outcome] += 1

    def _fault(self, number: int, what: str) -> None:
        """Count a fault, and print it if it is the first of its kind."""
        self.counts["faults"] += 1
        where = what.rpartition(" | ")[2]
        alike = where if where.strip() else re.sub(r"[^a-z ]+", "", what.partition(":")[0] + what[-60:])
        self.faults[alike] += 1
        if self.faults[alike] > 1:
            return
        again = f"--seed {self.seed} --only {self.name} --case {number}"
        print(f"fault: {what}\n    again: python -m tests.fuzz.run {again}", flush=True)


def fuzz(names: list[str], seed: int, cases: int, jobs: int) -> list[Run]:
    """Run targets, `jobs` at a time."""
    from tests.fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="rotary-fuzz-") as folder, ThreadPoolExecutor(jobs) as pool:
        runs = [Run(name, seed, max(1, int(cases * TARGETS[name].share)), Path(folder)) for name in names]
        return list(pool.map(Run.run, runs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("--case", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.seed, given.first, given.cases, given.folder)
        return 0
    names = given.only.split(",")
    if given.case is not None:
        from tests.fuzz.targets import TARGETS

        with tempfile.TemporaryDirectory(prefix="rotary-fuzz-") as folder:
            print(TARGETS[names[0]](Path(folder)).case(rng_of(given.seed, names[0], given.case)))
        return 0
    print(f"fuzz: seed {given.seed}", flush=True)
    runs = fuzz(names, given.seed, given.cases, given.jobs)
    for run in runs:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(run.counts.items()))
        print(f"{run.name:12} {sum(run.counts.values()):6} cases in {run.seconds:4.0f} s: {counts}")
    return 1 if any(run.faults for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
