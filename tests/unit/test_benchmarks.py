# SPDX-License-Identifier: MIT
"""The benchmarks' own logic, and runs with tiny models, whose figures mean nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import click
import pytest

from benchmarks import cgroups, report
from benchmarks.cells import Cell, Variant, plan
from benchmarks.rounds import Benchmark
from tests.support import HANG_S, ROOT

V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
38 31 0:35 / /sys/fs/cgroup/blkio rw,relatime shared:9 - cgroup cgroup rw,blkio
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
CONTAINER = "35 31 0:32 /docker/1a /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("mountinfo", "membership", "controller", "expected"),
    [
        (V1, "4:memory:/job\n7:blkio:/\n0::/u\n", "memory", (1, "/sys/fs/cgroup/memory/job")),
        (V1, "4:memory:/job\n7:blkio:/\n0::/u\n", "io", (1, "/sys/fs/cgroup/blkio")),
        (V2, "0::/user.slice/a.scope\n", "memory", (2, "/sys/fs/cgroup/user.slice/a.scope")),
        (CONTAINER, "4:cpu,memory:/docker/1a/b\n", "memory", (1, "/sys/fs/cgroup/memory/b")),
    ],
)
def test_own_group_is_found_in_either_version(mountinfo, membership, controller, expected):
    version, own, _ = cgroups.hierarchy(controller, mountinfo, membership)
    assert (version, str(own)) == expected


def test_no_hierarchy_is_an_error_with_a_name():
    with pytest.raises(OSError, match="no cgroup hierarchy with memory"):
        cgroups.hierarchy("memory", "24 22 0:2 / /proc rw - proc proc rw\n", "0::/\n")


def test_v2_group_is_made_where_controllers_are_delegated(tmp_path, monkeypatch):
    own = tmp_path / "slice" / "scope"
    own.mkdir(parents=True)
    for folder, delegated in ((own, ""), (own.parent, "memory io pids"), (tmp_path, "memory io")):
        (folder / "cgroup.subtree_control").write_text(delegated)
    monkeypatch.setattr(cgroups, "hierarchy", lambda controller: (2, own, tmp_path))
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # files of a real group go with it
    with cgroups.group(5 << 20, ("8:0", 1 << 20)) as group:
        (folder,) = group.folders
        assert folder.parent == own.parent
        assert (folder / "memory.max").read_text() == str(5 << 20)
        assert (folder / "io.max").read_text() == f"8:0 rbps={1 << 20}"
        assert group.joined_by == [str(folder / "cgroup.procs")]
        (folder / "cgroup.procs").write_text("")
        (folder / "memory.peak").write_text("77\n")
        (folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
        assert (group.peak_bytes(), group.oom_kills()) == (77, 1)
    assert not folder.exists()

    (own.parent / "cgroup.subtree_control").write_text("memory")
    (tmp_path / "cgroup.subtree_control").write_text("")
    with pytest.raises(OSError, match="delegates memory and io"), cgroups.group(5 << 20, ("8:0", 1)):
        pass


def test_plan_measures_what_differs_most():
    routings, memory = ["repeat", "calibrated", "random"], [0.6, 0.35, None]
    cells = plan(["q4_0"], routings, memory, ["machine", "slow"], every=False)
    assert [(c.disk, c.memory, c.kind, c.streams, c.shown) for c in cells] == [
        ("machine", None, "calibrated", ("calibrated", "repeat"), True),
        ("machine", None, "random", ("random",), False),
        ("machine", 0.6, "calibrated", ("calibrated",), True),
        ("slow", 0.6, "calibrated", ("calibrated", "repeat"), True),
        ("slow", 0.35, "calibrated", ("calibrated",), True),
        ("slow", 0.6, "random", ("random",), True),
    ]
    every = plan(["q4_0", "q8_0"], routings, memory, ["machine", "slow"], every=True)
    assert len(every) == 2 * (2 + 2 * 2 * 2)
    # Hashes of logits are comparable only after the same tokens: each cell's streams begin its reference's.
    for cell in (*cells, *every):
        reference = next(c for c in cells if c.memory is None and c.kind == cell.kind)
        assert reference.streams[: len(cell.streams)] == cell.streams


def test_plan_of_a_subset():
    (reference, cell) = plan(["q8_0"], ["random"], [0.35], ["machine"], every=False)
    assert not reference.shown and reference.kind == "random"
    assert (cell.memory, cell.streams) == (0.35, ("random",))


MODEL_BYTES = 1000 * 2**20
LIMITED = Cell("q4_0", "slow", 0.6, "calibrated", ("calibrated",))
IN_MEMORY = Cell("q4_0", "machine", None, "calibrated", ("calibrated",))


def run(cell, variant, decode, prefill=100.0, hash_="a", **stats):
    """A run as `Benchmark.run` records it."""
    return {
        "cell": str(cell), "type": cell.type, "disk": cell.disk, "memory": cell.memory, "kind": cell.kind,
        **asdict(variant), "round": 1, "outcome": "measured", "seconds": 1.0, "peak_bytes": 7,
        "limit_bytes": 8, "prefill": prefill,
        "streams": {"calibrated": {"decode": decode, "hash": hash_, "cut": False,
                                   "stats": {"active": True, **stats}}},
    }  # fmt: skip


def failed(cell, variant, outcome):
    return {**run(cell, variant, 0.0), "outcome": outcome, "streams": {}, "prefill": None}


def everything(runs):
    return {
        "machine": {"cpu": "a CPU", "n_threads": 2, "kernel": "6"},
        "settings": {"n_prompt": 512, "n_warm": 16, "n_decode": 10},
        "disks": {name: {"what": name, "bandwidth": 500 * 2**20} for name in ("machine", "slow")},
        "skipped": {"fast": "no loop device"},
        "models": {"q4_0 calibrated": MODEL_BYTES},
        "repacks": {"q4_0": True},
        "overlap": {"q4_0 calibrated": {"calibrated": 0.375}},
        "cells": [{"name": str(cell), **asdict(cell)} for cell in (IN_MEMORY, LIMITED)],
        "runs": runs,
    }


def test_rows_targets_and_text():
    stock = [Variant("stock", False, 128), Variant("stock", False, 1024), Variant("stock", True, 128)]
    runs = [
        run(IN_MEMORY, Variant("stock", True), 20.0),
        run(IN_MEMORY, Variant("stock", False), 16.0),
        run(IN_MEMORY, Variant("rotary", True), 19.0),
        *(run(LIMITED, stock[0], decode, 50.0) for decode in (4.0, 6.0, 5.0)),
        run(LIMITED, stock[1], 5.5, 10.0),  # only one run, so never the best
        failed(LIMITED, stock[2], "killed"),
        run(LIMITED, Variant("rotary"), 8.0, 100.0, hit_rate=0.9, bytes_read=450 * 2**20, read_us=1_000_000),
        run(LIMITED, Variant("rotary", prefetch=False), 6.4, bytes_paged=500 * 2**20),
    ]  # fmt: skip
    found = everything(runs)
    found["rows"] = report.rows(found)
    fits, limited = found["rows"]
    assert fits["decode_ratio"] == pytest.approx(0.95) and "roofline" not in fits
    assert (limited["decode_stock"], limited["decode_stock_variant"]) == (5.0, "read-ahead 128, plain")
    assert limited["decode_ratio"] == pytest.approx(1.6)
    assert limited["prefill_ratio"] == pytest.approx(2.0)
    assert limited["missed_bytes"] == 50 * 2**20
    # 50 MiB per token at 500 MiB/s is 0.1 s, more than computing's 0.05 s; 8 tok/s are 0.125 s per token.
    assert limited["roofline"] == pytest.approx(0.8)
    assert limited["prefetch_gain"] == pytest.approx(1.25)
    assert limited["read_share"] == pytest.approx(0.9)
    assert limited["unfinished"]["stock"] == ["read-ahead 128, repacked: killed"]

    found["targets"] = report.targets(found["rows"])
    met = {t["target"]: [level["met"] for level in t["levels"]] for t in found["targets"]}
    assert met["decode of stock's best at 60 %"] == [True, False]
    assert met["decode of stock's best in memory"] == [False]
    assert met["share of the roofline"] == [False]
    assert "decode of stock's best at 35 %" not in met, "not measured, so not judged"
    text = "\n".join(report.lines(found))
    assert "slow disk: 1.60 (q4_0, 60%, calibrated): 1.30 met, 2.00 missed" in text
    assert "fast disk left out: no loop device" in text


def test_rotary_that_does_not_finish_misses():
    reference = run(IN_MEMORY, Variant("stock", True), 20.0)
    runs = [reference, run(LIMITED, Variant("stock"), 5.0), failed(LIMITED, Variant("rotary"), "killed")]
    rows = report.rows(everything(runs))
    (target,) = [t for t in report.targets(rows) if t["target"].endswith("60 %")]
    assert target["failed"] and not any(level["met"] for level in target["levels"])


def test_other_logits_end_the_benchmark():
    benchmark = Benchmark({}, {}, {}, "auto", [128], 1.0)
    benchmark.runs = [
        run(IN_MEMORY, Variant("stock", True), 20.0, hash_="a"),
        run(IN_MEMORY, Variant("stock", False), 20.0, hash_="b"),
    ]
    benchmark.check(LIMITED, Variant("rotary"), run(LIMITED, Variant("rotary"), 8.0, hash_="a"))
    with pytest.raises(click.ClickException, match="must be equal"):
        benchmark.check(LIMITED, Variant("rotary"), run(LIMITED, Variant("rotary"), 8.0, hash_="b"))
    benchmark.check(LIMITED, Variant("rotary", False), run(LIMITED, Variant("rotary", False), 8.0, hash_="b"))


def script(name, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / name, *arguments]
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)


@pytest.mark.slow
@pytest.mark.model
def test_decode_runs(native, tiny_model):
    result = script("decode.py", tiny_model, "-n", 8, "--prompt", 16, "--rounds", 1, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert "| stock |" in result.stdout and "| 25% |" in result.stdout


@pytest.mark.slow
@pytest.mark.model
def test_beyond_ram_runs(native, tmp_path):
    reason = cgroups.unavailable()
    if reason:
        pytest.skip(reason)
    result = script("beyond_ram.py", "--quick", "--dir", tmp_path, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    disks = {"machine", "fast", "slow"} - set(figures["skipped"])
    assert {row["disk"] for row in figures["rows"] if row["memory"]} == disks
    assert all(row["decode_rotary"] for row in figures["rows"])
    killed = [r for r in figures["runs"] if r["outcome"] == "killed"]
    assert killed and all(r["system"] == "stock" and r["repack"] for r in killed), "copies do not fit"
    limited = [r for r in figures["runs"] if r["outcome"] == "measured" and r["limit_bytes"]]
    assert all(r["peak_bytes"] <= r["limit_bytes"] for r in limited)
    result = script("plots.py", tmp_path / "figures.json", "-o", tmp_path / "figures.svg")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "figures.svg").read_text()
    assert figures["date"] in text and all(f"{name} disk of" in text for name in disks)


@pytest.mark.slow
def test_gpu_without_a_gpu(native, tmp_path):
    result = script("gpu.py", "measure", "--dry-run", "--budgets", "25%", "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    [results] = json.loads((tmp_path / "figures.json").read_text())["models"].values()
    ways = ("host", "no prefetch", "device")
    names = ["resident", "ncmoe all", "op-offload", *(f"rotary, {way}, 25%" for way in ways)]
    assert list(results) == names and not any("failed" in each for each in results.values()), results
    assert len({each["logits"] for each in results.values()}) == 1, "the same logits whatever the variant"
    assert all(f"| {name} |" in result.stdout for name in names)


@pytest.mark.slow
def test_convert(native, tiny_model, tmp_path):
    result = script("convert.py", tiny_model, "--rounds", "1", "-n", "4", "--folder", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rotary convert,") == 2 and "| converted, slots repacked |" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_beyond_ram_leaves_nothing_behind(tmp_path):
    reason = cgroups.unavailable()
    if reason:
        pytest.skip(reason)
    script = ROOT / "benchmarks" / "beyond_ram.py"
    command = [sys.executable, script, "--quick", "--reader", "--dir", tmp_path]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, **streams
    ) as process:
        stdout, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, stderr
    assert "machine disk: plain reader" in stdout
    # Other mounts may appear meanwhile.
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            assert str(tmp_path) not in loop.read_text()
    _, own, _ = cgroups.hierarchy("memory")
    assert not list(own.glob(f"rotary-bench-{process.pid}-*"))


def test_plans_are_held_against_runs(native, tiny_model, monkeypatch):
    from click.testing import CliRunner

    from benchmarks import plan as planned

    def run(others, module, function, *arguments):
        if function == "calibrate":
            rates = dict.fromkeys(("cpu_prompt_layer_s", "disk_cpu_s", "repack_rate"), 0.0)
            rates |= {"ram_rate": 10e9, "copy_rate": 5e9, "disk_rate": 1e9}
            return {**rates, "cpu_flops": 1e11, "cpu_layer_s": 1e-6}
        config = arguments[1]
        return {"decode": 100.0, "prefill": 200.0, "hit_rate": 0.5 if config else None}

    monkeypatch.setattr(planned, "undisturbed", run)
    arguments = [str(tiny_model), "--budgets", "100%,25%", "--prompt", "64", "-n", "16", "--rounds", "1"]
    ran = CliRunner().invoke(planned.main, [*arguments, "--threads", "1"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    table = [line.split("|") for line in ran.output.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in table] == [
        "stock", "100%, mmap", "25%, mmap", "100%, direct", "25%, direct",
    ]  # fmt: skip
    predicted = [float(row[5]) for row in table]
    assert predicted[0] == predicted[1] == predicted[3] > predicted[2] > 0
    # Direct reads fetch missed experts at 1 GB/s, copies from the page cache at 5 GB/s.
    assert float(table[4][5]) < predicted[2]


def test_runs_beside_other_processes_are_repeated(monkeypatch):
    from benchmarks import plan as planned

    busy = iter([0.0, 50.0, 50.0, 50.0])  # 50 busy seconds during the first run, none during the second
    monkeypatch.setattr(planned, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(planned, "_wait_for_idle", lambda _: None)
    monkeypatch.setattr(planned, "_child_seconds", lambda: 0.0)
    results = iter([{"run": 1}, {"run": 2}])
    monkeypatch.setattr(planned, "in_process", lambda *_: next(results))
    assert planned.undisturbed(0.05, "a", "b") == {"run": 2}


def test_in_a_container_no_run_is_repeated(monkeypatch):
    from benchmarks import plan as planned

    monkeypatch.setattr(planned, "busy_seconds", lambda: None)
    monkeypatch.setattr(planned.time, "sleep", lambda _: pytest.fail("waited for what nobody can tell"))
    results = iter([{"run": 1}])
    monkeypatch.setattr(planned, "in_process", lambda *_: next(results))
    assert planned.undisturbed(0.05, "a", "b") == {"run": 1}
