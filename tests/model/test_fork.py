# SPDX-License-Identifier: MIT
"""Processes that fork: servers that load a model and then start workers, programs that fork beside a graph.

The child exits normally whether it frees the model or not, can compute with it unless the parent was
computing when it forked, and never disturbs the parent. A child that hangs is killed by its alarm.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading

import pytest

from tests.support.compiled import Disk
from tests.support.paged import assert_equal, load_late, make
from tests.support.processes import apart, expected_io
from tests.support.tracing import trace

pytestmark = pytest.mark.model

PROMPT = 40
LONGEST = 60  # seconds; a child that takes longer hangs
IN_BATCHES = {"n_ubatch": 32}
TWO_THREADS = {"n_threads": 2, "n_threads_batch": 2}
DIRECT = {"budget": "50%", "store": "direct"}
READERS = ["threads", "io_uring"]


def in_child(work):
    """Call `work` in a child; returns its result, or the type and text of its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(LONGEST)
        os.close(reading)
        try:
            result = work()
        except BaseException as error:
            result = type(error).__name__, str(error)
        with os.fdopen(writing, "wb") as file:
            pickle.dump(result, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    return pickle.loads(said)


def leave(model, rotary, options, how):
    """Run, fork a child that exits in the given way, then run again."""
    llama = make(model, rotary, **options)
    found = [trace(llama, PROMPT)]
    pid = os.fork()
    if pid == 0:
        signal.alarm(LONGEST)
        if how == "close":
            llama.close()
            os._exit(0)
        if how == "delete":
            del llama
            gc.collect()
            os._exit(0)
        if how == "_exit":
            os._exit(0)
        sys.exit(0)  # runs all exit handlers of the interpreter
    status = os.waitpid(pid, 0)[1]
    found.append(trace(llama, PROMPT))
    return status, found, llama.rotary_stats()


@pytest.mark.parametrize("how", ["close", "delete", "exit", "_exit"])
@pytest.mark.parametrize("io", READERS)
def test_a_child_that_leaves(native, synthetic, stock_trace, io, how):
    model = synthetic(type="q8_0", layers=3)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    status, found, stats = apart(leave, model, DIRECT, IN_BATCHES, how, environment={"ROTARY_IO": io})
    assert status == 0, "the child ended by itself"
    assert stats["store"] == "direct"
    for paged in found:
        assert_equal(paged, stock)


def compute_in_a_child(model, rotary, options, before):
    """Run in the parent if `before`, in a child, in its child, in the parent, and in another child."""
    llama = make(model, rotary, **options)
    found = [trace(llama, PROMPT)] if before else []

    def younger():
        mine = trace(llama, PROMPT)
        found.append(mine)
        return mine, in_child(lambda: trace(llama, PROMPT)), llama.rotary_stats()

    child, grandchild, stats = in_child(younger)
    return [*found, child, grandchild, trace(llama, PROMPT), in_child(lambda: trace(llama, PROMPT))], stats


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "after a run"])
@pytest.mark.parametrize("threads", [{}, TWO_THREADS], ids=["one thread", "two threads"])
@pytest.mark.parametrize("io", READERS)
@pytest.mark.parametrize("budget", ["50%", "100%"])
def test_a_child_computes(native, synthetic, stock_trace, io, threads, before, budget):
    # With several threads, and after a run, stock waits for OpenMP's threads, which a child does not have.
    model = synthetic(type="q4_0", layers=3)
    options = {**IN_BATCHES, **threads}
    stock = stock_trace(model, n_prompt=PROMPT, **options)
    rotary = {**DIRECT, "budget": budget}
    found, stats = apart(compute_in_a_child, model, rotary, options, before, environment={"ROTARY_IO": io})
    for paged in found:
        assert_equal(paged, stock)
    assert (stats["store"], stats["io"]) == ("direct", expected_io(io)), "the child reads as its parent did"


def change_budget_in_a_child(model, options):
    llama = make(model, DIRECT, **options)
    found = [trace(llama, PROMPT)]

    def change():
        llama.rotary_set_budget("100%")
        return trace(llama, PROMPT)

    return [*found, in_child(change), trace(llama, PROMPT)]


def test_a_child_changes_its_budget(native, synthetic, stock_trace):
    model = synthetic(type="q4_0", layers=3)
    options = {**IN_BATCHES, **TWO_THREADS}
    for paged in apart(change_budget_in_a_child, model, options):
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, **options))


def compute_side_by_side(model, n_runs):
    """Compute in parent and child at the same time, `n_runs` runs each."""
    llama = make(model, {**DIRECT, "budget": "min"}, **IN_BATCHES)
    trace(llama, PROMPT)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(2 * LONGEST)
        with os.fdopen(writing, "wb") as file:
            pickle.dump([trace(llama, PROMPT) for _ in range(n_runs)], file)
        os._exit(0)
    os.close(writing)
    found = [trace(llama, PROMPT) for _ in range(n_runs)]
    with os.fdopen(reading, "rb") as file:
        found += pickle.load(file)
    return os.waitpid(pid, 0)[1], found


@pytest.mark.parametrize("io", READERS)
def test_parent_and_child_compute_at_once(native, synthetic, stock_trace, io):
    model = synthetic(type="q8_0", layers=3)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    status, found = apart(compute_side_by_side, model, 4, environment={"ROTARY_IO": io})
    assert status == 0 and len(found) == 8
    for paged in found:
        assert_equal(paged, stock)


def fork_in_mid_read(model, n_forks):
    """Fork in another thread while a graph waits for reads; the children compute, or free the model."""
    disk = Disk()
    llama = make(model, {**DIRECT, "budget": "min"}, **IN_BATCHES)
    trace(llama, PROMPT)
    disk.delay_us = 2000
    children = []

    def compute():
        return "computed", trace(llama, PROMPT)

    def free():
        llama.close()
        return "closed", None

    def fork():
        for number in range(n_forks):
            seen = disk.reads
            while disk.reads < seen + 5 and not done.is_set():
                pass
            children.append(in_child(free if number % 2 else compute))

    done = threading.Event()
    thread = threading.Thread(target=fork)
    thread.start()
    found = []
    while thread.is_alive():
        found.append(trace(llama, PROMPT))
    done.set()
    thread.join()
    return found, children


def test_forks_beside_a_graph(native, synthetic, stock_trace, disk):
    model = synthetic(type="q8_0", layers=3)
    stock = stock_trace(model, n_prompt=PROMPT, **IN_BATCHES)
    found, children = apart(fork_in_mid_read, model, 6, environment=disk["threads"])
    assert len(children) == 6
    for paged in found:
        assert_equal(paged, stock)
    for kind, text in children:
        if kind == "computed":
            assert_equal(text, stock)
        elif kind != "closed":
            assert "forked while" in text and "load the model" in text, (kind, text)


def compute_on_a_gpu_in_a_child(model):
    load_late()
    llama = make(model, {"inner": "LATE0", "budget": "50%"}, n_gpu_layers=-1, **IN_BATCHES)
    return trace(llama, PROMPT), in_child(lambda: trace(llama, PROMPT)), trace(llama, PROMPT)


def test_a_gpu_is_not_for_children(native, synthetic, stock_trace, late):
    model = synthetic(type="q4_0", layers=2)
    before, (kind, text), after = apart(compute_on_a_gpu_in_a_child, model, environment=late)
    assert "forked after the model was loaded" in text and text.count("; ") == 1, (kind, text)
    for paged in (before, after):
        assert_equal(paged, stock_trace(model, n_prompt=PROMPT, use_extra_bufts=False, **IN_BATCHES))
