# SPDX-License-Identifier: MIT
"""Reads on a restricted kernel: io_uring missing, old or failing midway, threads that cannot be started.

Each run has a process of its own; it is exact, and a notice says what was missing and why.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
import threading

import pytest

from rotary_llamacpp.gguf_files.header import read_header
from tests.support.compiled import Disk
from tests.support.paged import assert_equal, attempt, make
from tests.support.processes import apart, has_io_uring
from tests.support.tracing import trace

pytestmark = pytest.mark.model

PROMPT = 40
IN_BATCHES = {"n_ubatch": 32}
DIRECT = {"budget": "50%", "store": "direct"}


@pytest.fixture
def io_uring(native, synthetic):
    """Skip where this kernel or its sandbox has no io_uring."""
    if not has_io_uring():
        pytest.skip("no io_uring here")
    assert apart(run, synthetic(type="q4_0", layers=2, experts=15), {}, {})[1]["io"] == "uring"


def run(model, before, after):
    """Run twice, with the knobs `before` set before the model is loaded and `after` before the first run."""
    if before:
        Disk().set(**before)
    llama = make(model, DIRECT, **IN_BATCHES)
    if after:
        Disk().set(**after)
    found = [attempt(trace, llama, PROMPT), attempt(trace, llama, PROMPT)]
    return found, llama.rotary_stats()


# ---- from the first


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"no_uring": errno.EPERM}, f"io_uring_setup: {os.strerror(errno.EPERM)}"),
        ({"no_uring": errno.ENOSYS}, f"io_uring_setup: {os.strerror(errno.ENOSYS)}"),
        ({"no_uring": errno.ENOMEM}, f"io_uring_setup: {os.strerror(errno.ENOMEM)}"),
        ({"enter_error": errno.EPERM}, f"io_uring_enter: {os.strerror(errno.EPERM)}"),
        ({"old_uring": 1}, "Linux 5.6"),
    ],
)
def test_io_uring_that_cannot_be_used(io_uring, synthetic, stock_trace, disk, knobs, reason):
    model = synthetic(type="q4_0", layers=2, experts=15)
    found, stats = apart(run, model, knobs, {}, environment=disk["io_uring"])
    for paged in found:
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    assert stats["io"] == "threads"
    said = [notice for notice in stats["notices"] if "io_uring" in notice]
    assert len(said) == 1 and reason in said[0], stats["notices"]


# ---- a ring that stops


def break_in_mid_read(model, knobs, n_hold):
    """io_uring_enter() fails while `n_hold` reads are in flight; they end once the failure was seen."""
    disk = Disk()
    llama = make(model, DIRECT, **IN_BATCHES)
    found = [attempt(trace, llama, PROMPT)]
    disk.set(hold=n_hold, **knobs)
    let_go = disk.library.disk_let_go

    def end_reads():
        while not disk.enter_failed and not done.is_set():
            done.wait(0.001)
        let_go()

    done = threading.Event()
    thread = threading.Thread(target=end_reads)
    thread.start()
    found.append(attempt(trace, llama, PROMPT))
    done.set()
    thread.join()
    found.append(attempt(trace, llama, PROMPT))
    return found, llama.rotary_stats(), disk.held, disk.enter_failed


@pytest.mark.parametrize(
    ("knobs", "ends"),
    [
        ({"enter_error": errno.EPERM, "enter_waits": 1}, True),  # the ring still accepts reads
        ({"enter_error": errno.EPERM, "enter_waits": 0}, True),
        ({"enter_error": errno.ENOMEM, "enter_waits": 1, "n_enter_fail": 5}, False),
        ({"enter_error": errno.EAGAIN, "enter_waits": 0, "n_enter_fail": 5}, False),
    ],
    ids=["cannot wait", "cannot enter", "no memory for a while", "busy for a while"],
)
@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])  # read into staging, and directly into slots
def test_io_uring_that_stops(io_uring, synthetic, stock_trace, disk, kind, knobs, ends):
    model = synthetic(type=kind, layers=3)
    # If the ring accepts no more reads, none can be held: those in flight were submitted before.
    n_hold = 3 if knobs["enter_waits"] else 0
    found, stats, n_held, n_failed = apart(
        break_in_mid_read, model, knobs, n_hold, environment=disk["io_uring"]
    )
    assert n_held == n_hold and n_failed > 0
    for paged in found:
        assert isinstance(paged, dict), paged
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    said = [notice for notice in stats["notices"] if "io_uring" in notice]
    assert (stats["io"], len(said)) == (("threads", 1) if ends else ("uring", 0)), stats["notices"]
    if ends:
        assert f"io_uring_enter: {os.strerror(knobs['enter_error'])}" in said[0]


def run_cancelled(model):
    """Run, run while the kernel cancels all reads, and run again."""
    disk = Disk()
    llama = make(model, DIRECT, **IN_BATCHES)
    found = []
    for cancel in (0, 1, 0):
        disk.cancel = cancel
        found.append(attempt(trace, llama, PROMPT))
    return found, llama.rotary_stats()


def test_io_uring_that_cancels_all_reads(io_uring, synthetic, stock_trace, disk):
    """The kernel does so where a limit of processes keeps it from starting its own threads."""
    if tuple(map(int, re.findall(r"[0-9]+", os.uname().release)[:2])) < (6, 10):
        pytest.skip("the kernel cannot inject results into io_uring")
    model = synthetic(type="q4_0", layers=3)
    found, stats = apart(run_cancelled, model, environment=disk["io_uring"])
    for paged in found:
        assert isinstance(paged, dict), paged
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    assert stats["io"] == "threads"
    assert any(os.strerror(errno.ECANCELED) in notice for notice in stats["notices"]), stats["notices"]


# ---- a sandbox by seccomp

SYSCALLS = {"setup": 425, "enter": 426}  # the same on all architectures
ARCHITECTURES = {"x86_64", "aarch64", "riscv64", "ppc64le"}


def forbid(number, error):
    """Make a system call fail in this thread, by seccomp(2); returns why that is impossible, or None."""
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (load, 0, 0, 0),
            (jump_if_equal, 0, 1, number),
            (give, 0, 0, 0x00050000 | error),
            (give, 0, 0, 0x7FFF0000),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    whole = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((38, 1, 0, 0, 0), (22, 2, whole, 0, 0)):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        if libc.prctl(*(each if isinstance(each, bytes) else ctypes.c_ulong(each) for each in call)) != 0:
            return os.strerror(ctypes.get_errno())
    return None


def run_forbidden(model, before, after, error):
    """Run three times, with a system call forbidden before the model is loaded, or after the first run."""
    why = before and forbid(SYSCALLS[before], error)
    llama = make(model, DIRECT, **IN_BATCHES)
    found = [attempt(trace, llama, PROMPT)]
    why = why or (after and forbid(SYSCALLS[after], error))
    found += [attempt(trace, llama, PROMPT), attempt(trace, llama, PROMPT)]
    return why, found, llama.rotary_stats()


@pytest.mark.skipif(platform.machine() not in ARCHITECTURES, reason="io_uring's syscalls are unknown here")
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
@pytest.mark.parametrize(("before", "after"), [("setup", None), ("enter", None), (None, "enter")])
def test_seccomp_forbids_io_uring(io_uring, synthetic, stock_trace, before, after, error):
    model = synthetic(type="q8_0", layers=3)
    why, found, stats = apart(run_forbidden, model, before, after, error)
    if why:
        pytest.skip(f"no seccomp here: {why}")
    for paged in found:
        assert isinstance(paged, dict), paged
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    said = [notice for notice in stats["notices"] if "io_uring" in notice]
    assert stats["io"] == "threads" and len(said) == 1, stats["notices"]
    assert f"io_uring_{before or after}: {os.strerror(error)}" in said[0]


# ---- threads


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_threads_that_cannot_be_started(native, synthetic, stock_trace, disk, n_threads):
    model = synthetic(type="q8_0", layers=3)
    found, stats = apart(run, model, {"threads_left": n_threads}, {}, environment=disk["threads"])
    for paged in found:
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    said = [notice for notice in stats["notices"] if f"only {n_threads} of 8 threads" in notice]
    assert len(said) == 1 and os.strerror(errno.EAGAIN) in said[0], stats["notices"]


def test_neither_io_uring_nor_threads(io_uring, synthetic, stock_trace, disk):
    model = synthetic(type="q8_0", layers=3)
    knobs = {"threads_left": 0, "no_uring": errno.EPERM}
    found, stats = apart(run, model, knobs, {}, environment=disk["io_uring"])
    for paged in found:
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **IN_BATCHES))
    assert stats["io"] == "threads" and len(stats["notices"]) >= 2, stats["notices"]


# ---- a bad part of the disk


def decode_beside_bad_experts(model, bad, budget, n_tokens):
    """Run `n_tokens` prompts while the bytes in the range `bad` cannot be read; returns how each run ends."""
    llama = make(model, {"budget": budget, "store": "direct", "staging": 1}, n_batch=1, n_ubatch=1)
    found = [attempt(trace, llama, PROMPT)]
    Disk().set(bad_from=bad[0], bad_to=bad[1])
    for start in range(n_tokens):
        llama.reset()
        try:
            llama.eval([3 + (7 * start + 11 * i) % 200 for i in range(40)])
            found.append("read")
        except Exception as error:
            found.append(str(error))
    Disk().set(bad_from=0, bad_to=0)
    return [*found, attempt(trace, llama, PROMPT)]


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize("budget", ["min", "50%", "75%"])
def test_a_bad_part_of_the_disk(native, synthetic, stock_trace, disk, io, budget):
    # Prefetches from that part fail, and the staging they took must be free again for reads that succeed.
    model = synthetic(type="q4_0", layers=6)
    bad = [
        each for each in read_header(model).tensors if each.name.startswith("blk.4.") and "_exps" in each.name
    ]
    region = min(each.offset for each in bad), max(each.offset + each.n_bytes for each in bad)
    options = {"n_batch": 1, "n_ubatch": 1}
    first, *ends, last = apart(decode_beside_bad_experts, model, region, budget, 12, environment=disk[io])
    for paged in (first, last):
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **options))
    refused = [end for end in ends if end != "read"]
    assert refused, "none of it was wanted"
    for end in refused:
        assert f"{model}: blk.4." in end and "check the disk" in end, end
