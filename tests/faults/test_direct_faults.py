# SPDX-License-Identifier: MIT
"""A disk that is slow, reads fewer bytes than asked, or fails, and files that change under a running model.

Each run has a process of its own, which must exit by itself with status 0: logits are right or an error says
what happened, and the next run is exact. faulty_disk.c plays the disk; a loop device is a real disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.runtime.generation import Watcher, generate
from tests.support import shards
from tests.support.compiled import Disk
from tests.support.paged import assert_equal, attempt, make
from tests.support.processes import Apart, apart, expected_io, reads_directly
from tests.support.tracing import trace

pytestmark = pytest.mark.model

PROMPT = 40
ONE_BY_ONE = {"n_batch": 1, "n_ubatch": 1}
IN_BATCHES = {"n_ubatch": 32}
MIN = {"budget": "min", "store": "direct"}


def assert_refused(found, *parts):
    assert isinstance(found, tuple), "a run that could not be right went on"
    kind, text = found
    assert kind == "ReadError" and "\n" not in text, found
    assert all(part in text for part in parts) and text.count("; ") >= 1, text


# ---- slow


def run_slowly(model, options):
    """Run with reads that take longer than computing a token.

    Returns the trace, the statistics before and after it, and the delay of a read in microseconds.
    """
    disk = Disk()
    llama = make(model, MIN | {"budget": "50%"}, **options)
    before = llama.rotary_stats()
    trace(llama, PROMPT, 1)
    start = time.monotonic()
    llama.eval([1])
    delay_us = max(2000, round(2e6 * (time.monotonic() - start)))
    llama.rotary_reset_stats()
    disk.delay_us = delay_us
    return trace(llama, PROMPT, 4), before, llama.rotary_stats(), delay_us


def test_slow_reads_split_decode(native, synthetic, stock_trace, disk):
    # Decode waits longer than two passes cost: the first computes resident experts, the second those read.
    model = synthetic(type="q4_0", embd=512, ff=512, layers=3)
    paged, before, stats, delay_us = apart(run_slowly, model, ONE_BY_ONE, environment=disk["threads"])
    assert_equal(paged, stock_trace(model, n_prompt=PROMPT, n_decode=4, **ONE_BY_ONE))
    assert stats["io"] == "threads" and stats["stall_us"] > delay_us
    assert stats["waves"] == 0, "no batch wanted more experts than slots"
    assert stats["staging_bytes"] > before["staging_bytes"], "but passes there were: they need scratch memory"
    assert 0 <= stats["late_hits"] <= stats["prefetch_used"] <= stats["prefetched"]
    assert stats["late_hits"] > 0 and stats["prefetch_timeliness"] < 1


def test_slow_reads_in_waves(native, synthetic, stock_trace, disk):
    model = synthetic(type="q4_k_m", layers=3)
    paged, _, stats, delay_us = apart(run_slowly, model, IN_BATCHES, environment=disk["threads"])
    assert_equal(paged, stock_trace(model, n_prompt=PROMPT, n_decode=4, **IN_BATCHES))
    assert stats["waves"] > 0 and stats["stall_us"] > delay_us
    assert 0 <= stats["late_hits"] <= stats["prefetch_used"] <= stats["prefetched"]


# ---- short


WAYS = {  # the file system tells how direct reads must be aligned, does not tell, or refuses direct reads
    "direct": {},
    "page": {"no_statx": 1},
    "buffered": {"no_direct": 1},
    "refused": {"no_reads": 1},
    "no io_uring": {"no_uring": errno.EPERM},
}
# Repacked slots are filled by a copy. Plain slots are read into, also by prefetch where slots are to spare.
WHERE_READ = [("q4_0", "min"), ("q8_0", "50%")]

SHORT = {
    "threads": [
        ("direct", {"withheld": 1}),
        ("direct", {"withheld": 5001}),
        ("direct", {"withheld": 1 << 15}),
        ("direct", {"max": 4096 + 100}),
        ("page", {"withheld": 5001}),
        ("buffered", {"withheld": 1}),
        ("buffered", {"max": 1999}),
        ("refused", {"withheld": 1}),
    ],
    "io_uring": [
        ("direct", {"withheld": 1 << 15}),
        ("page", {"max": 8192}),
        ("buffered", {"max": 4096}),
        ("refused", {"max": 4096}),
    ],
}


def run_short(model, cases):
    """For each case: the result of a run, its statistics, how many reads came short or ended unaligned."""
    disk = Disk()
    found = []
    for way, knobs in cases:
        disk.set(no_statx=0, no_direct=0, no_reads=0, no_uring=0)
        disk.set(**WAYS[way])
        llama = make(model, {**MIN, "staging": 1}, **IN_BATCHES)
        n_short, n_odd = disk.short, disk.odd
        disk.set(**knobs)
        result = attempt(trace, llama, PROMPT)
        found.append((result, llama.rotary_stats(), disk.short - n_short, disk.odd - n_odd))
        disk.mend()
        llama.close()
    return found


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_reads_that_come_short(native, synthetic, stock_trace, disk, io):
    model = synthetic(type="q4_0", layers=2, experts=15)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    found = apart(run_short, model, SHORT[io], environment=disk[io])
    for (way, knobs), (paged, stats, n_short, n_odd) in zip(SHORT[io], found, strict=True):
        assert isinstance(paged, dict), (way, knobs, paged)
        assert_equal(paged, stock)
        odd = any(n % 512 != 0 for n in knobs.values())
        assert n_short > 10 and (n_odd > 10) == odd, (way, knobs)
        assert stats["store"] == "direct" and stats["bytes_read"] > 0
        assert stats["io"] == expected_io(io)
        said = any("refuses direct reads" in notice for notice in stats["notices"])
        assert said == (way in ("buffered", "refused") or not reads_directly(model))


def test_io_uring_refused(native, synthetic, stock_trace, disk):
    model = synthetic(type="q4_0", layers=2, experts=15)
    [(paged, stats, *_)] = apart(run_short, model, [("no io_uring", {})], environment=disk["io_uring"])
    assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    assert stats["io"] == "threads" and any("io_uring" in notice for notice in stats["notices"])


# ---- failing


def run_with_failures(model, rotary, error, starts):
    """For each start: the result of a run whose reads all fail from that one on, then of a run without."""
    disk = Disk()
    llama = make(model, rotary, **IN_BATCHES)
    found = []
    for start in starts:
        disk.set(error=error)
        disk.fail_next(1 << 20, after=start)
        failed = attempt(trace, llama, PROMPT)
        disk.mend()
        found.append((failed, attempt(trace, llama, PROMPT)))
    return found


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize(("kind", "budget"), WHERE_READ)
def test_failing_reads(native, synthetic, stock_trace, disk, io, prefetch, kind, budget):
    # Reads fail from the first read on, from a read within a batch's waves on, from a read in decode on.
    model = synthetic(type=kind, layers=3)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    rotary = {**MIN, "prefetch": prefetch, "budget": budget}
    runs = apart(run_with_failures, model, rotary, 5, [0, 7, 40, 75], environment=disk[io])
    reason = "Input/output error" if io == "threads" else "Bad file descriptor"
    for failed, mended in runs:
        assert_refused(failed, f"{model}: blk.", "_exps.weight, expert ", reason, "check the disk")
        assert_equal(mended, stock)


def test_files_that_end_early(native, synthetic, stock_trace, disk):
    model = synthetic(type="q4_0", layers=3)
    [(failed, mended)] = apart(run_with_failures, model, MIN, 0, [9], environment=disk["threads"])
    assert_refused(failed, f"{model}: blk.", "No data available")
    assert_equal(mended, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))


def run_with_single_failures(model, rotary, starts):
    """For each start: how many reads failed in a run with one failing read, its result, and the next run's.

    Logits are compared in this process, since there are many.
    """
    disk = Disk()
    llama = make(model, rotary, **ONE_BY_ONE)
    stock = trace(llama, 16, 4)
    found = []
    for start in starts:
        disk.fail_next(1, after=start)
        n_failed = disk.failed
        failed = attempt(trace, llama, 16, 4)
        n_failed = disk.failed - n_failed
        disk.mend()
        kind = failed if isinstance(failed, tuple) else np.array_equal(failed["logits"], stock["logits"])
        found.append((n_failed, kind, np.array_equal(trace(llama, 16, 4)["logits"], stock["logits"])))
    return stock, found


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize(("kind", "budget"), WHERE_READ)
def test_single_failures(native, synthetic, stock_trace, disk, io, kind, budget):
    # A read that failed before a lookup waits for it is tried again; a read that fails while waited for is an
    # error.
    model = synthetic(type=kind, layers=3)
    rotary, starts = {**MIN, "budget": budget}, list(range(0, 44, 6))
    stock, found = apart(run_with_single_failures, model, rotary, starts, environment=disk[io])
    assert_equal(stock, stock_trace(model, n_prompt=16, n_decode=4, **ONE_BY_ONE))
    for n_failed, kind, exact_again in found:
        assert n_failed == 1 and exact_again
        if isinstance(kind, tuple):
            assert_refused(kind, str(model))
        else:
            assert kind, "neither an error nor exact"


def load_with_failures(model, budget):
    """Make all experts resident; reads fail while the model is loaded, then while its budget changes."""
    disk = Disk()
    rotary = {"budget": budget, "store": "direct"}
    disk.fail_next(1 << 20, after=2)
    found = [attempt(lambda: bool(make(model, rotary, **IN_BATCHES)))]
    disk.mend()
    llama = make(model, rotary, **IN_BATCHES)
    found.append(attempt(trace, llama, PROMPT))
    llama.rotary_set_budget("min")
    found.append(attempt(trace, llama, PROMPT))
    disk.fail_next(1 << 20, after=2)
    found.append(attempt(llama.rotary_set_budget, budget))
    found.append(attempt(trace, llama, PROMPT))
    disk.mend()
    found.append((attempt(trace, llama, PROMPT), llama.rotary_stats()))
    for other in (budget, "50%"):
        llama.rotary_set_budget(other)
        found.append(attempt(trace, llama, PROMPT))
    return found


@pytest.mark.parametrize("budget", ["100%", "auto"])
def test_failing_reads_while_slots_are_filled(native, synthetic, stock_trace, disk, budget):
    model = synthetic(type="q4_0", layers=3)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    at_load, first, least, at_change, at_run, (mended, stats), all_again, half = apart(
        load_with_failures, model, budget, environment=disk["threads"]
    )
    for refused in (at_load, at_change, at_run):
        assert_refused(refused, f"{model}: blk.", "Input/output error")
    for exact in (first, least, mended, all_again, half):
        assert_equal(exact, stock)
    assert stats["path"] == "resident" and stats["notices"] == [], "no budget was lowered"


# ---- files that change


CHANGES = ("truncate 0", "truncate 60", "truncate 99", "overwrite", "append")
GOING_AWAY = ("unlink", "replace")


def change(path, how):
    size = os.path.getsize(path)
    if how.startswith("truncate"):
        os.truncate(path, int(how.split()[1]) * size // 100)
    elif how == "overwrite":
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(os.urandom(size // 2))
    elif how == "append":
        with open(path, "ab") as file:
            file.write(b"more")
    elif how == "unlink":
        os.unlink(path)
    elif how == "replace":
        with open(path + ".new", "wb") as file:
            file.write(os.urandom(size))
        os.replace(path + ".new", path)


def change_files(model, folder, store, options):
    """For each change: its file, and the results of runs before and after it. Progress goes to stderr."""
    found = {}
    for number, how in enumerate(CHANGES + GOING_AWAY):
        print(how, file=sys.stderr, flush=True)
        path = str(shutil.copy(model, folder / f"{number}.gguf"))
        llama = make(path, {"budget": "min", "store": store}, **options)
        before = attempt(trace, llama, PROMPT)
        change(path, how)
        found[how] = path, before, attempt(trace, llama, PROMPT), attempt(trace, llama, PROMPT)
        llama.close()
    return found


@pytest.mark.parametrize("offload", [{}, {"n_gpu_layers": 2}], ids=["all layers", "two layers"])
@pytest.mark.parametrize("store", ["direct", "mmap"])
def test_files_that_change(native, synthetic, stock_trace, tmp_path, store, offload):
    model = synthetic(type="q8_0", layers=3)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    found = apart(change_files, model, tmp_path, store, {**IN_BATCHES, **offload})
    for how in CHANGES:
        path, before, *after = found[how]
        assert_equal(before, stock)
        for refused in after:
            assert_refused(refused, f"{path}: was changed", "load the model again")
    for how in GOING_AWAY:  # an open file stays readable
        for each in found[how][1:]:
            assert_equal(each, stock)


def truncate_others(model):
    """Cut the shards that have no experts."""
    llama = make(model, MIN, **IN_BATCHES)
    before = attempt(trace, llama, PROMPT)
    for path in shards(model):
        if not has_experts(path):
            os.truncate(path, 4096)
    return before, attempt(trace, llama, PROMPT)


def has_experts(path):
    return any("_exps" in tensor.name for tensor in read_header(path).tensors)


def test_a_shard_without_experts_that_changes(native, synthetic, tmp_path):
    source = synthetic(type="q4_0", layers=2, vocab=8192, shards=4)
    paths = [Path(shutil.copy(path, tmp_path)) for path in shards(source)]
    assert not all(map(has_experts, paths)), "the model has what is tested"
    before, after = apart(truncate_others, paths[0])
    if isinstance(after, tuple):
        assert_refused(after, "was changed")
    else:
        assert_equal(after, before)


def change_while_running(model, how):
    disk = Disk()
    llama = make(model, MIN, **IN_BATCHES)
    found = [attempt(trace, llama, PROMPT)]

    def spoil():
        disk.wait_until_held()
        change(str(model), how)
        disk.mend()

    disk.hold_next(after=12)
    thread = threading.Thread(target=spoil)
    thread.start()
    found.append(attempt(trace, llama, PROMPT))
    thread.join()
    return found


@pytest.mark.parametrize("how", ["truncate 1", "overwrite"])
def test_a_file_that_changes_under_a_graph(native, synthetic, stock_trace, tmp_path, disk, how):
    source = synthetic(type="q8_0", layers=3)
    model = shutil.copy(source, tmp_path)
    before, after = apart(change_while_running, model, how, environment=disk["threads"])
    assert_equal(before, stock_trace(source, n_prompt=PROMPT, **IN_BATCHES))
    assert_refused(after, f"{model}: was changed")


# ---- a device that fails


@pytest.fixture
def volume(tmp_path):
    """Mount point of a file system on a loop device, and the image file behind it."""
    if os.geteuid() != 0:
        pytest.skip("only root may have loop devices")
    for tool in ("losetup", "mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", image], check=True)
    with contextlib.ExitStack() as stack:
        loop = subprocess.run(
            ["losetup", "--find", "--show", "--direct-io=on", image], capture_output=True, text=True
        )
        if loop.returncode != 0:
            pytest.skip(f"no loop device: {loop.stderr.strip()}")
        device = loop.stdout.strip()
        stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
        ran = subprocess.run(["mount", "-o", "noatime", device, mounted], capture_output=True, text=True)
        if ran.returncode != 0:
            pytest.skip(f"cannot mount: {ran.stderr.strip()}")
        stack.callback(subprocess.run, ["umount", mounted], check=True)
        yield mounted, image


def break_the_device(model, image):
    """Results of runs before, while the last three quarters of the device are gone, and afterwards."""
    llama = make(model, MIN, **IN_BATCHES)
    found = [attempt(trace, llama, PROMPT)]
    size = os.path.getsize(image)
    with open(image, "r+b") as file:
        file.seek(size // 4)
        kept = file.read()
        file.truncate(size // 4)
        found.append(attempt(trace, llama, PROMPT))
        file.seek(size // 4)
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
        found.append(attempt(trace, llama, PROMPT))
    return found, llama.rotary_stats()


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_a_device_that_fails(native, synthetic, stock_trace, volume, io):
    mounted, image = volume
    source = synthetic(type="q8_0", layers=12)
    model = shutil.copy(source, mounted / "model.gguf")
    subprocess.run(["sync", "-f", mounted], check=True)
    (before, broken, mended), stats = apart(break_the_device, model, image, environment={"ROTARY_IO": io})
    stock = stock_trace(source, n_prompt=PROMPT, **IN_BATCHES)
    assert_equal(before, stock)
    assert_refused(broken, f"{model}: blk.", "Input/output error")
    assert_equal(mended, stock)
    assert stats["io"] == expected_io(io)


# ---- interrupts


def run_until_interrupted(model, waiting):
    """Generate with a read of the prompt that waits until a signal comes, then run again.

    The file `waiting` appears when the read waits.
    """
    disk = Disk()
    llama = make(model, MIN, **IN_BATCHES)
    # Python runs signal handlers in the main thread, which is in the graph; this pipe is written at once.
    come, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)

    def watch():
        disk.wait_until_held()
        waiting.touch()
        os.read(come, 1)
        disk.mend()

    class Starting(Watcher):
        def prompt(self, llama, n_tokens):
            disk.hold_next(after=4)
            threading.Thread(target=watch).start()

    result = generate(llama, "x" * 200, 40, temp=0, watcher=Starting())
    return result.interrupted, result.completion_tokens, trace(llama, PROMPT)


def test_interrupted_in_mid_read(native, synthetic, stock_trace, tmp_path, disk):
    model = synthetic(type="q4_0", layers=3)
    waiting = tmp_path / "waiting"
    with Apart(run_until_interrupted, model, waiting, environment=disk["threads"]) as run:
        run.wait_for(waiting)
        run.process.send_signal(signal.SIGINT)
        interrupted, n_made, paged = run.result()
    assert interrupted and n_made <= 1, "what had been asked for was not finished"
    assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
