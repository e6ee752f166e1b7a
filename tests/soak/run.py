# SPDX-License-Identifier: MIT
"""Run everything that may go wrong at the same time, for long; logits must always be stock's.

    python -m tests.soak.run [--minutes 20] [--seed 1] [--only generate,budgets,forks] [--without forks]

Threads of one process draw INGREDIENTS, functions that use the shared models, again and again. A `Model` has
the logits that stock computes in a process of its own; runs must be exact each time, and what must fail must
fail with the package's own error of one line. Prints a line of progress every half minute. At the end,
memory, threads, descriptors and mappings are compared with those after the first third, and no temporary
folder may be left. Exit status: 0 nothing was wrong, 1 something was.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as llama_api
import numpy as np

from models.synth import synthesize
from rotary_llamacpp import Llama, policies
from rotary_llamacpp.errors import DeviceError, RotaryError
from rotary_llamacpp.native import binding as _native
from tests.support import ROOT
from tests.support.paged import logits, second_context, stock_trace, use_adapter, write_adapter
from tests.support.tracing import OPTIONS, trace

MIB = 1 << 20
# Verbose, with QUIET as log callback: without verbose, stock redirects the process's stdout for all threads.
OURS = {**OPTIONS, "n_threads": 1, "n_threads_batch": 1, "n_ubatch": 32, "verbose": True}
QUIET = llama_api.llama_log_callback(lambda *_: None)
# Bytes by which memory may grow after the first third. With one heap for the process: heaps of single threads
# vary by a hundred megabytes of freed memory.
GROWTH_BYTES = 24 * MIB
ONE_HEAP = "MALLOC_ARENA_MAX"
EVERY_SECONDS = float(os.environ.get("SOAK_EVERY", "30"))  # a line of progress
STUCK_SECONDS = 300  # limit for one step, after which all stacks are printed and the run ends
BUDGETS = ("min", "25%", "50%", "100%", "5 slots", "auto")
SHORT, LONG = 6, 40
N_DECODE = 4


class Wrong(Exception):
    """Something that must not happen."""


class Model:
    """A model file, and stock's results with it by number of prompt tokens."""

    def __init__(self, path: Path, repack: bool = True, lora: Path | None = None) -> None:
        self.path, self.repack, self.lora = path, repack, lora
        self.stock = {n: self._stock(n) for n in (SHORT, LONG)}

    def _stock(self, n_prompt: int) -> dict[str, np.ndarray]:
        options = {"n_prompt": n_prompt, "n_decode": N_DECODE, "n_ubatch": 32}
        if self.lora is not None:
            options["lora_path"] = str(self.lora)
        return stock_trace(self.path, use_extra_bufts=self.repack, **options)

    def load(self, path: Path | None = None, **rotary: Any) -> Llama:
        """Load the model paged, with these options of Rotary."""
        rotary = {"repack": self.repack, "verbose": False, **rotary}
        more = {"lora_path": str(self.lora)} if self.lora else {}
        return Llama(str(path or self.path), rotary=rotary, **OURS, **more)

    def check(self, llama: Any, rng: Random) -> None:
        """Compute a prompt and an answer, and check that all logits are stock's to the bit."""
        n_prompt = rng.choice((SHORT, LONG))
        found, stock = trace(llama, n_prompt, N_DECODE), self.stock[n_prompt]
        if not np.array_equal(found["logits"], stock["logits"]):
            rows = np.flatnonzero((found["logits"] != stock["logits"]).any(axis=1))
            raise Wrong(
                f"{self.path.name}: logits of {n_prompt} tokens differ from stock's at {rows.tolist()}"
            )


class World:
    """State that threads share: models, counts and errors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [
            Model(synthesize(folder / "q4.gguf", "test", type="q4_0", layers=3)),
            Model(synthesize(folder / "q8.gguf", "test", type="q8_0", layers=2), repack=False),
            Model(synthesize(folder / "oss.gguf", "test-gpt-oss", type="mxfp4", layers=2)),
            Model(ROOT / "models" / "tiny-moe-q8_0.gguf"),
            Model(synthesize(folder / "split", "test", type="q4_k", layers=2, shards=2)),
        ]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.steps: dict[int, tuple[str, float]] = {}  # by thread: ingredient, and time of its start

    def model(self, rng: Random) -> Model:
        return rng.choice(self.models)


def some_rotary(rng: Random) -> dict[str, Any]:
    """Random options of Rotary."""
    return {
        "budget": rng.choice(BUDGETS),
        "store": rng.choice(("mmap", "direct", "direct", "auto")),
        "prefetch": rng.choice((True, True, False, "popular", "transition", "mixed", "similar", "previous")),
        "policy": rng.choice(("auto", *policies.NATIVE)),
        "split": rng.choice(("adaptive", "even")),
        "direct": rng.random() < 0.7,
    }


@contextlib.contextmanager
def loaded(
    world: World, rng: Random, model: Model | None = None, **rotary: Any
) -> Iterator[tuple[Model, Any]]:
    """A paged model, closed at the end."""
    model = model or world.model(rng)
    llama = model.load(**{**some_rotary(rng), **rotary})
    try:
        yield model, llama
    finally:
        llama.close()


def refuses(call: Callable[[], Any], *parts: str) -> None:
    """Check that `call` raises the package's own error, in one line that contains these words."""
    try:
        call()
    except RotaryError as error:
        said = str(error)
        if len(said.splitlines()) != 1 or not all(part in said for part in parts):
            raise Wrong(f"an error of other words: {said!r}, {parts} wanted") from None
        return
    raise Wrong(f"no error, {parts} wanted")


# ---- ingredients -------------------------------------------------------------------------------------


def generate(world: World, rng: Random) -> None:
    """Load a model, compute a few times, close it."""
    with loaded(world, rng) as (model, llama):
        for _ in range(rng.randint(1, 4)):
            model.check(llama, rng)
        llama.rotary_stats()


def budgets(world: World, rng: Random) -> None:
    """Change the budget between prompts, also to invalid ones."""
    with loaded(world, rng) as (model, llama):
        for _ in range(rng.randint(1, 4)):
            model.check(llama, rng)
            llama.rotary_set_budget(rng.choice(BUDGETS))
            if rng.random() < 0.3:
                refuses(lambda: llama.rotary_set_budget(rng.choice(("1", "0.01%", "lots", "101%"))), "budget")
        model.check(llama, rng)


def contexts(world: World, rng: Random) -> None:
    """Use two models, and a second context of one of them, in turn."""
    with loaded(world, rng) as (model, llama), loaded(world, rng) as (other, beside):
        tokens = [int(token) for token in np.random.default_rng(LONG).integers(3, llama.n_vocab(), LONG)]
        context, run = second_context(llama)
        try:
            expected = model.stock[LONG]["logits"][:LONG]
            for _ in range(2):
                other.check(beside, rng)
                for found in (run(tokens), logits(llama, tokens)):
                    if found.shape == expected.shape and not np.array_equal(found, expected):
                        raise Wrong(f"{model.path.name}: two contexts, and other logits")
        finally:
            context.close()
        model.check(llama, rng)


def figures(world: World, rng: Random) -> None:
    """Read and reset statistics in another thread while a model computes."""
    with loaded(world, rng) as (model, llama):
        done = threading.Event()
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                while not done.is_set():
                    stats = llama.rotary_stats()
                    if stats["hits"] > stats["requests"]:
                        raise Wrong(f"{stats['hits']} hits of {stats['requests']} requests")
                    if rng.random() < 0.1:
                        llama.rotary_reset_stats()
                    done.wait(0.002)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            for _ in range(3):
                model.check(llama, rng)
        finally:
            done.set()
            thread.join()
        if failed:
            raise failed[0]


def changes(world: World, rng: Random) -> None:
    """Replace, remove, truncate or overwrite the file of a loaded model."""
    model = rng.choice([each for each in world.models if "-00001-" not in each.path.name])
    with tempfile.TemporaryDirectory(dir=world.folder) as folder:
        copy = Path(shutil.copy(model.path, folder))
        llama = model.load(copy, **some_rotary(rng) | {"budget": "min", "direct": True})
        try:
            model.check(llama, rng)
            how = rng.choice(("replace", "unlink", "truncate", "overwrite"))
            if how == "replace":
                shutil.copy(rng.choice(world.models).path, f"{copy}.new")
                os.replace(f"{copy}.new", copy)
            elif how == "unlink":
                copy.unlink()
            elif how == "truncate":
                os.truncate(copy, copy.stat().st_size * rng.choice((0, 50, 99)) // 100)
            else:
                with open(copy, "r+b") as file:
                    file.seek(copy.stat().st_size // 2)
                    file.write(os.urandom(MIB // 8))
            for _ in range(2):
                if how in ("replace", "unlink"):  # the open file stays readable
                    model.check(llama, rng)
                else:
                    refuses(lambda: model.check(llama, rng), "was changed", "load the model again")
        finally:
            llama.close()


class Raises(policies.Lru):
    """A policy that raises once, at the call to which `left` counts down."""

    left = 0

    def choose(self, candidates: Any) -> int:
        Raises.left -= 1
        if Raises.left == 0:
            raise ZeroDivisionError("of the policy")
        return super().choose(candidates)


raising = threading.Lock()


def policies_that_raise(world: World, rng: Random) -> None:
    """Use a policy in Python that raises in mid-run: that call raises, and the next is right."""
    with raising, loaded(world, rng, budget="min", policy=Raises, direct=False) as (model, llama):
        Raises.left = rng.randint(1, 40)
        with contextlib.suppress(ZeroDivisionError):
            model.check(llama, rng)
        Raises.left = 0
        model.check(llama, rng)


def own_policies(world: World, rng: Random) -> None:
    """Use a policy and a predictor in Python."""
    from rotary_llamacpp import predictors

    own: dict[str, Any] = {"policy": rng.choice(list(policies.REFERENCES.values())), "budget": "min"}
    if rng.random() < 0.5:
        own["prefetch"] = rng.choice([getattr(predictors, name) for name in ("Previous", "Similar")])
    with loaded(world, rng, **own) as (model, llama):
        model.check(llama, rng)
        model.check(llama, rng)


adapted: dict[str, Model] = {}
adapting = threading.Lock()


def adapted_model(world: World, which: str) -> Model:
    """The first model with an adapter for its attention or its experts, made once."""
    with adapting:
        if which not in adapted:
            base = world.models[0].path
            lora = write_adapter(world.folder / f"{which}.gguf", base, (f"{which}.weight",), 1)
            adapted[which] = Model(base, lora=lora)
        return adapted[which]


def adapters(world: World, rng: Random) -> None:
    """Use a LoRA adapter that is loaded and freed with its model."""
    model = adapted_model(world, rng.choice(("attn_q", "ffn_up_exps")))
    with loaded(world, rng, model) as (_, llama):
        model.check(llama, rng)


def late_adapters(world: World, rng: Random) -> None:
    """Load a LoRA adapter after slots were sized and the store was opened, and free it before the model."""
    model, with_it = world.models[0], adapted_model(world, rng.choice(("attn_q", "ffn_up_exps")))
    with loaded(world, rng, model) as (_, llama):
        model.check(llama, rng)
        for _ in range(rng.randint(1, 2)):
            loaded_one = llama_api.llama_adapter_lora_init(llama._model.model, str(with_it.lora).encode())
            if not loaded_one:
                raise Wrong("an adapter was not loaded")
            use_adapter(llama, loaded_one)
            with contextlib.suppress(DeviceError):  # refused if another thread is loading a model
                with_it.check(llama, rng)
            use_adapter(llama, None)
            model.check(llama, rng)
            llama_api.llama_adapter_lora_free(loaded_one)
            model.check(llama, rng)


def memory(world: World, rng: Random) -> None:
    """Let another process take half of the available memory, and free it while a model runs."""
    from rotary_llamacpp.host.machine import available_memory

    n_bytes = min(available_memory() // 2, 2 << 30)
    eater = subprocess.Popen(
        [sys.executable, "-c", f"a = bytearray({n_bytes}); a[::4096] = b'x' * len(a[::4096]);"
         "print(1, flush=True); import sys; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        with loaded(world, rng, budget=rng.choice(("auto", "100%"))) as (model, llama):
            assert eater.stdout is not None
            eater.stdout.readline()
            model.check(llama, rng)
            llama.rotary_set_budget("auto")
            model.check(llama, rng)
            eater.kill()
            eater.wait()
            llama.rotary_set_budget("auto")
            model.check(llama, rng)
    finally:
        eater.kill()
        eater.wait()
        for stream in (eater.stdin, eater.stdout):
            if stream is not None:
                stream.close()


def threads(world: World, rng: Random) -> None:
    """Load, run and close several models in threads of their own; hand another model to another thread."""
    failed: list[BaseException] = []
    seeds = [rng.getrandbits(32) for _ in range(3)]

    def one(seed: int) -> None:
        try:
            generate(world, Random(seed))
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=one, args=(seed,)) for seed in seeds]
    with loaded(world, rng) as (model, llama):
        for worker in workers:
            worker.start()
        model.check(llama, rng)
        handed = threading.Thread(target=lambda: model.check(llama, Random(1)))
        handed.start()
        handed.join()
        for worker in workers:
            worker.join()
    if failed:
        raise failed[0]


def forks(world: World, rng: Random) -> None:
    """Fork while a model is loaded: the child loads its own, or exits; the parent's model still works."""
    with loaded(world, rng) as (model, llama):
        model.check(llama, rng)
        what = rng.choice(("ends", "exits", "own", "executes"))
        child = os.fork()
        if child == 0:
            status = 3
            try:
                signal.alarm(120)
                if what == "executes":
                    os.execv("/bin/true", ["true"])
                if what == "own":
                    other = Model.__new__(Model)
                    other.__dict__.update(world.model(rng).__dict__)
                    mine = other.load(**some_rotary(rng))
                    other.check(mine, rng)
                    mine.close()
                status = 0
                if what == "exits":
                    llama.close()
            except BaseException:
                print(f"wrong: child: {traceback.format_exc()}", flush=True)
            finally:
                os._exit(status)
        model.check(llama, rng)
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise Wrong(f"a forked child that {what}: status {os.waitstatus_to_exitcode(status)}")
        model.check(llama, rng)


def dropped(world: World, rng: Random) -> None:
    """Drop a model without closing it, and try to load damaged ones."""
    model = world.model(rng)
    llama = model.load(**some_rotary(rng))
    model.check(llama, rng)
    del llama
    refuses(lambda: Llama("no-such-model.gguf", rotary="min"), "no such file")
    with tempfile.NamedTemporaryFile(dir=world.folder, suffix=".gguf") as file:
        file.write(model.path.read_bytes()[: rng.randint(1, 4000)])
        file.flush()
        refuses(lambda: Llama(file.name, rotary="min"))
    refuses(lambda: model.load(budget="1"), "budget")


def stock_beside(world: World, rng: Random) -> None:
    """Use stock's class beside a paged model in the same process."""
    with loaded(world, rng) as (model, llama):
        plain = llama_cpp.Llama(str(world.models[0].path), **OURS)
        try:
            model.check(llama, rng)
            world.models[0].check(plain, rng)
        finally:
            plain.close()


INGREDIENTS: dict[str, Callable[[World, Random], None]] = {
    each.__name__: each
    for each in (
        generate, budgets, contexts, figures, changes, policies_that_raise, own_policies, adapters,
        late_adapters, memory, threads, forks, dropped, stock_beside,
    )
}  # fmt: skip
# Ingredients that run alone: a child of fork() has no other threads, but the locks that these held.
ALONE = ("forks",)


# ---- the run -----------------------------------------------------------------------------------------


class Turns:
    """Lets threads work at the same time, except for steps that must run alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._working, self._waiting = 0, 0

    @contextlib.contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        with self._condition:
            if alone:
                self._waiting += 1
                self._condition.wait_for(lambda: self._working == 0)
                self._waiting -= 1
            else:
                self._condition.wait_for(lambda: self._waiting == 0 and self._working >= 0)
            self._working = -1 if alone else self._working + 1
        try:
            yield
        finally:
            with self._condition:
                self._working = 0 if alone else self._working - 1
                self._condition.notify_all()


def work(world: World, turns: Turns, names: list[str], seed: int, number: int) -> None:
    """Draw and run ingredients in a thread until the end."""
    n_done = 0
    while not world.ending.is_set():
        n_done += 1
        step = f"{seed}/{number}/{n_done}"
        rng = Random(step)
        name = rng.choice(names)
        with turns.turn(name in ALONE):
            world.steps[number] = (name, time.monotonic())
            try:
                INGREDIENTS[name](world, rng)
                outcome = name
            except BaseException as error:
                outcome = "wrong"
                said = error if isinstance(error, Wrong) else traceback.format_exc()
                with world.lock:
                    world.wrong.append(f"{name}, step {step}: {said}")
                    print(f"wrong: {world.wrong[-1]}", flush=True)
            world.steps.pop(number, None)
        with world.lock:
            world.counts[outcome] += 1


def state() -> dict[str, int]:
    """Resources that may leak: bytes, threads, descriptors, mappings."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns memory that ended threads had freed in their heaps
    statm = Path("/proc/self/statm").read_text().split()
    shared = int(statm[2])
    return {
        "bytes": (int(statm[1]) - shared) * resource.getpagesize(),
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
    }


def at_rest(turns: Turns) -> dict[str, int]:
    """The resources in use while no model is loaded."""
    with turns.turn(True):
        return state()


def leaks(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Resources that have grown by more than is allowed, a line each."""
    allowed = {"bytes": GROWTH_BYTES, "threads": 0, "descriptors": 0, "mappings": 200}
    return [
        f"{name}: {before[name]} after the first third, {after[name]} at the end, {most} more at most"
        for name, most in allowed.items()
        if after[name] > before[name] + most
    ]


def soak(names: list[str], minutes: float, seed: int, n_threads: int) -> int:
    """Run the soak test; returns the exit status."""
    logging.disable(logging.CRITICAL)  # of fallbacks, again and again
    faulthandler.enable(file=sys.stdout)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # stock's output about its models
    llama_api.llama_log_set(QUIET, None)
    _native.load()
    with tempfile.TemporaryDirectory(prefix="rotary-soak-") as folder:
        print(f"soak: seed {seed}, {minutes:g} minutes, {n_threads} threads: {', '.join(names)}", flush=True)
        world, turns = World(Path(folder)), Turns()
        for which in ("attn_q", "ffn_up_exps") if any("adapters" in name for name in names) else ():
            adapted_model(world, which)
        begin = time.monotonic()
        workers = [
            threading.Thread(target=work, args=(world, turns, names, seed, number), daemon=True)
            for number in range(n_threads)
        ]
        for worker in workers:
            worker.start()
        before = watch(world, turns, begin, 60 * minutes)
        world.ending.set()
        for worker in workers:
            worker.join(STUCK_SECONDS)
        stuck = [name for name, _ in world.steps.values()]
        if stuck:
            faulthandler.dump_traceback(sys.stdout, all_threads=True)
            print(f"soak: {', '.join(stuck)} did not end within {STUCK_SECONDS} s", flush=True)
            os._exit(1)
        after = state()
        left = [path.name for path in Path(folder).iterdir() if path.is_dir()]
        more = [*leaks(before, after), *(f"left behind: {name}" for name in left)]
        for what in more:
            print(f"wrong: {what}")
        print(report(world, begin, after))
        print(f"soak: {'clean' if not more and not world.wrong else f'{len(more) + len(world.wrong)} wrong'}")
        return 1 if more or world.wrong else 0


def watch(world: World, turns: Turns, begin: float, seconds: float) -> dict[str, int]:
    """Print a line every half minute until the end; returns the resources after the first third."""
    before: dict[str, int] | None = None
    said = begin
    while (now := time.monotonic()) < begin + seconds:
        time.sleep(min(1.0, begin + seconds - now))
        for name, since in list(world.steps.values()):
            if now - since > STUCK_SECONDS:
                faulthandler.dump_traceback(sys.stdout, all_threads=True)
                print(f"soak: {name} is stuck for {now - since:.0f} s", flush=True)
                os._exit(1)
        if before is None and now > begin + seconds / 3:
            before = at_rest(turns)
        if now > said + EVERY_SECONDS:
            said = now
            print(report(world, begin, at_rest(turns)), flush=True)
    return before or at_rest(turns)


def report(world: World, begin: float, now: dict[str, int]) -> str:
    """A line of progress."""
    with world.lock:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(world.counts.items()))
    return (
        f"{time.monotonic() - begin:5.0f} s: {now['bytes'] / MIB:.0f} MiB, {now['threads']} threads, "
        f"{now['descriptors']} descriptors: {counts}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", "20")))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(INGREDIENTS))
    parser.add_argument("--without", default="")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name not in given.without.split(",")]
    if unknown := sorted(set(names) - set(INGREDIENTS)):
        parser.error(f"no such ingredient: {', '.join(unknown)}; there are {', '.join(INGREDIENTS)}")
    if ONE_HEAP not in os.environ:
        os.environ[ONE_HEAP] = "1"
        os.execv(sys.executable, sys.orig_argv)  # glibc reads the variable at a process's start
    return soak(names, given.minutes, given.seed, given.threads)


if __name__ == "__main__":
    sys.exit(main())
