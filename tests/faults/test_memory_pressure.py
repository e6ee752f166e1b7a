# SPDX-License-Identifier: MIT
"""Models larger than memory: runs in a memory cgroup that is smaller than the model.

The kernel kills a process that exceeds its group's limit, so that survival is part of the test. Needs root
and a cgroup, v1 or v2, below which memory groups can be made.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from rotary_llamacpp.errors import LibraryError
from rotary_llamacpp.gguf_files.info import ModelInfo
from rotary_llamacpp.host import cgroups, file_systems, machine
from rotary_llamacpp.units import MIB
from tests.support import no_hang
from tests.support.compiled import pure_logic
from tests.support.paged import assert_equal, make
from tests.support.processes import Apart, apart
from tests.support.tracing import trace
from tests.unit.test_machine import SOURCES as MACHINE_SOURCES

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_PROMPT, N_DECODE = 40, 6
OPTIONS = {"n_ubatch": 32}
GROUP_BYTES = 352 * MIB
EATEN_BYTES = 120 * MIB


@dataclass(frozen=True)
class Group:
    """One memory cgroup."""

    path: Path
    is_v2: bool

    def read(self, v1, v2):
        return int((self.path / (v2 if self.is_v2 else v1)).read_text())

    @property
    def prefix(self):
        """Words that, put before a command, run it in the group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.path)]

    @property
    def peak(self):
        """Peak of the bytes charged, page cache included."""
        return self.read("memory.max_usage_in_bytes", "memory.peak")

    @property
    def kills(self):
        """How many processes of the group were killed for lack of memory."""
        lines = (
            (self.path / ("memory.events" if self.is_v2 else "memory.oom_control")).read_text().split("\n")
        )
        return int(dict(line.split() for line in lines if line)["oom_kill"])

    def available(self):
        """Bytes that can still be allocated, page cache counted as free."""
        stat = (self.path / "memory.stat").read_text().splitlines()
        counts = {name: int(value) for name, value in map(str.split, stat)}
        names = (
            ("inactive_file", "active_file") if self.is_v2 else ("total_inactive_file", "total_active_file")
        )
        limit = self.read("memory.limit_in_bytes", "memory.max")
        used = self.read("memory.usage_in_bytes", "memory.current")
        return limit - used + sum(counts[name] for name in names)


def parents():
    """Directories below which a memory group can be made, from this process's own up."""
    for group in cgroups.own_groups("memory"):
        is_v2 = group.version == 2
        for folder in group.folders:
            control = folder / ("cgroup.subtree_control" if is_v2 else "memory.limit_in_bytes")
            if control.is_file() and (not is_v2 or "memory" in control.read_text().split()):
                yield folder, is_v2


@pytest.fixture
def group():
    """A memory cgroup of GROUP_BYTES."""
    if os.geteuid() != 0:
        pytest.skip("only root may make cgroups")
    made = None
    for folder, is_v2 in parents():
        path = folder / f"rotary-test-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            path.mkdir()
            made = Group(path, is_v2)
            break
    if made is None:
        pytest.skip("no memory cgroup below which another can be made")
    try:
        (path / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(GROUP_BYTES))
        for name in ("memory.swap.max", "memory.swappiness"):
            with contextlib.suppress(OSError):
                (path / name).write_text("0")
        yield made
    finally:
        with no_hang():  # killed processes take a moment to disappear
            while path.exists():
                with contextlib.suppress(OSError):
                    path.rmdir()
                time.sleep(0.005)


@pytest.fixture(scope="module")
def large(synthetic):
    """About 430 MiB of experts; one token's take 54 MiB."""
    model = synthetic(type="q4_0", layers=8, embd=1024, ff=1024, experts=32, used=4)
    assert ModelInfo.read(model).expert_bytes > 1.2 * GROUP_BYTES
    return model


def run(model, rotary):
    llama = make(model, rotary, **OPTIONS)
    found = trace(llama, N_PROMPT, N_DECODE)
    return found, llama.rotary_stats()


@pytest.fixture(scope="module")
def stock(native, large, stock_trace):
    return stock_trace(large, n_prompt=N_PROMPT, n_decode=N_DECODE, **OPTIONS)


@pytest.mark.parametrize("rotary", ["auto", "min", {"budget": "25%", "prefetch": False}])
def test_a_model_beyond_memory(group, large, stock, rotary):
    found, stats = apart(run, large, rotary, prefix=group.prefix)
    assert_equal(found, stock)
    assert stats["active"] and stats["store"] == "direct" and stats["bytes_read"] > 0
    assert stats["min_budget_bytes"] <= stats["slot_bytes"] <= stats["budget_bytes"] < GROUP_BYTES
    assert 4 <= stats["n_slots"] < 32
    assert group.kills == 0 and 0 < group.peak <= GROUP_BYTES
    if rotary == "auto":
        assert stats["slot_bytes"] > 1.2 * stats["min_budget_bytes"], "auto takes what there is"


def test_the_same_model_where_it_fits(large, stock):
    found, stats = apart(run, large, {"budget": "25%"})
    assert_equal(found, stock)
    assert (stats["store"], stats["bytes_read"], stats["shrinks"], stats["notices"]) == ("mmap", 0, 0, [])


def read_and_ask(path, library):
    """Memory that is available after reading a file, as plans and as paging see it, and the total."""
    from tests.unit.test_machine import native_memory

    with open(path, "rb") as file:
        while file.read(MIB):
            pass
    return machine.available_memory(), native_memory(ctypes.CDLL(library), "")[1], machine.total_memory()


def test_page_cache_is_not_counted_as_taken(group, tmp_path):
    if file_systems.in_memory(tmp_path):
        pytest.skip(f"{tmp_path}: lies in memory, what is read there is not cached")
    pure_logic(tmp_path, "unit/machine_host.cpp", *MACHINE_SOURCES)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB) * 256)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else it stays charged to this process
    for_plans, for_paging, total = apart(read_and_ask, path, str(tmp_path / "host.so"), prefix=group.prefix)
    assert group.peak > 200 * MIB, "the file is charged to the group"
    assert total == GROUP_BYTES
    for each in (for_plans, for_paging):
        assert GROUP_BYTES - 128 * MIB < each < GROUP_BYTES, "all but the interpreter is left"


def refused(model, rotary):
    try:
        make(model, rotary, **OPTIONS)
    except LibraryError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("budget", ["100%", "400MiB"])
def test_a_budget_beyond_memory(group, large, budget):
    said = apart(refused, large, budget, prefix=group.prefix)
    asked = ModelInfo.read(large).expert_bytes if budget == "100%" else 400 * MIB
    figures = [float(word) for word in said.split() if word.replace(".", "").isdigit()]
    assert said.startswith(f"{large.name}: no memory for ") and said.endswith("lower the budget")
    assert len(figures) == 2 and "\n" not in said
    slots, available = figures
    assert 0.9 * asked <= slots * MIB <= asked, "what was wanted"
    assert 0 < available * MIB < GROUP_BYTES, "what there is"
    assert group.kills == 0


def eat(group, most, full, stop):
    """Allocate `most` bytes in steps, leaving some memory to the group; then make `full`, wait for `stop`."""
    eaten = []
    while len(eaten) * 4 * MIB < most and not stop.exists():
        if group.available() > 24 * MIB:
            eaten.append(bytearray(b"x") * (4 * MIB))
        time.sleep(0.03)
    full.write_text("yes")
    while not stop.exists():
        time.sleep(0.02)
    return len(eaten) * 4 * MIB


def run_until(model, rotary, running, shrunk, stop):
    """Run again and again until `stop` exists and slots have grown again; returns traces, slots, statistics.

    `running` appears after the first run, `shrunk` after a run with fewer slots than the first.
    """
    llama = make(model, rotary, **OPTIONS)
    found, n_slots, stats = [], [], {}
    while not stop.exists() or n_slots[-1] == min(n_slots):
        found.append(trace(llama, N_PROMPT, N_DECODE))
        stats = llama.rotary_stats()
        assert all(layer["n_resident"] <= layer["n_slots"] for layer in stats["layers"])
        assert stats["min_budget_bytes"] <= stats["slot_bytes"] < GROUP_BYTES
        n_slots.append(stats["n_slots"])
        running.write_text("yes")
        if n_slots[-1] < n_slots[0]:
            shrunk.write_text("yes")
    return found, n_slots, stats


@pytest.mark.parametrize("budget", ["auto", "35%"])
def test_memory_that_others_take(group, large, stock, tmp_path, budget):
    running, shrunk, full, stop = (tmp_path / name for name in ("running", "shrunk", "full", "stop"))
    rotary = {"budget": budget, "store": "direct"}
    with contextlib.ExitStack() as stack:
        stack.callback(stop.write_text, "yes")
        paged = stack.enter_context(
            Apart(run_until, large, rotary, running, shrunk, stop, prefix=group.prefix)
        )
        paged.wait_for(running)
        other = stack.enter_context(Apart(eat, group, EATEN_BYTES, full, stop, prefix=group.prefix))
        other.wait_for(full)
        paged.wait_for(shrunk)  # the other process keeps the memory until then
        stop.write_text("yes")
        assert other.result() == EATEN_BYTES, "it got what it wanted"
        found, n_slots, stats = paged.result()
    assert group.kills == 0
    for each in found:
        assert_equal(each, stock)
    assert stats["shrinks"] > 0 and 4 <= min(n_slots) < n_slots[0]
    [notice] = [text for text in stats["notices"] if "memory runs short" in text]
    assert notice.startswith(f"{large.name}: ") and "slots shrink from" in notice
    assert n_slots[-1] > min(n_slots), "taken again when there is plenty"


def run_on_a_device(model, rotary):
    from tests.support.paged import load_late

    load_late()
    llama = make(model, {"inner": "LATE0", **rotary}, n_gpu_layers=-1, **OPTIONS)
    llama.eval([1, 2, 3])
    return llama.rotary_stats()


def test_most_of_the_memory_is_not_pinned_unasked(group, large, late):
    stats = apart(
        run_on_a_device, large, {"budget": "min", "store": "mmap"}, prefix=group.prefix, environment=late
    )
    [notice] = stats["notices"]
    assert "no more than three quarters are locked unasked" in notice and 'set pin to "on"' in notice
    assert stats["locked_bytes"] < stats["expert_bytes"] and group.kills == 0
