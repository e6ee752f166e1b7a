# SPDX-License-Identifier: MIT
"""The doctor's verdicts: this machine passes, and each kind of failure is found."""

from __future__ import annotations

import subprocess

import pytest

from rotary_llamacpp.host import disk, machine
from rotary_llamacpp.native import binding as _native
from rotary_llamacpp.runtime import doctor


def by_name(checks):
    return {check.name: check for check in checks}


def test_this_machine(native, tiny_model):
    checks = by_name(doctor.examine(str(tiny_model)))
    assert [name for name, check in checks.items() if check.verdict == doctor.FAIL] == []
    assert set(checks) == {
        "python", "llama.cpp", "llama-cpp-python", "native library", "abi", "device", "cuda paging",
        "processors", "memory", "page-lock limit", "disk",
    }  # fmt: skip
    assert "ROTARY0 over" in checks["device"].detail
    assert "tiny-moe" in checks["disk"].detail


def test_without_the_library(tiny_model, monkeypatch):
    monkeypatch.setenv("ROTARY_LIBRARY", "/no/such.so")
    monkeypatch.setattr(_native, "_loaded", None)
    checks = by_name(doctor.examine(str(tiny_model)))
    assert checks["native library"].verdict == checks["abi"].verdict == doctor.FAIL
    assert "pip install" in checks["native library"].advice
    assert "device" not in checks


@pytest.mark.parametrize(("returncode", "says"), [(-4, "another CPU"), (1, "ImportError: no libllama")])
def test_llama_cpp_that_cannot_be_imported(tiny_model, monkeypatch, returncode, says):
    result = subprocess.CompletedProcess([], returncode, "", "Traceback\nImportError: no libllama\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    checks = by_name(doctor.examine(str(tiny_model)))
    assert checks["llama.cpp"].verdict == doctor.FAIL and says in checks["llama.cpp"].detail
    assert "abi" not in checks, "what would crash here too is not tried"


@pytest.mark.parametrize(
    ("built", "inner", "verdict"), [(True, "CUDA0", "ok"), (False, "CUDA0", "warn"), (False, "CPU", "ok")]
)
def test_the_link_to_cuda_matters_for_its_gpus_only(monkeypatch, tmp_path, built, inner, verdict):
    monkeypatch.setattr(_native, "library_path", lambda: tmp_path / "libggml-rotary.so")
    monkeypatch.setattr(_native, "loaded", lambda: type("Loaded", (), {"default_inner": [inner]}))
    if built:
        (tmp_path / "libggml-rotary-cuda.so").touch()
    check = doctor._cuda_link()
    assert check.verdict == verdict and (check.detail == "on") == built


@pytest.mark.parametrize(("available", "verdict"), [(None, "warn"), (100 << 20, "warn"), (64 << 30, "ok")])
def test_memory(monkeypatch, available, verdict):
    monkeypatch.setattr(machine, "available_memory", lambda: available)
    assert doctor._memory().verdict == verdict


@pytest.mark.parametrize(
    ("limit", "inner", "verdict"),
    [(None, "CUDA0", "ok"), (8 << 20, "CPU", "ok"), (8 << 20, "CUDA0", "warn"), (1 << 30, "CUDA0", "ok")],
)
def test_page_lock_limit_matters_for_gpus_only(monkeypatch, limit, inner, verdict):
    monkeypatch.setattr(machine, "memlock_limit", lambda: limit)
    monkeypatch.setattr(_native, "loaded", lambda: type("Loaded", (), {"default_inner": [inner]}))
    assert doctor._memlock().verdict == verdict


def test_slow_disk(monkeypatch, tiny_model):
    monkeypatch.setattr(disk, "read_cold", lambda path: disk.ColdRead(10 << 20, 1.0, 0.1, "direct"))
    check = doctor._disk(str(tiny_model))
    assert check.verdict == doctor.WARN and "10 MiB/s" in check.detail and check.advice


def test_missing_file_for_the_disk_check(native):
    checks = by_name(doctor.examine("/no/such/file"))
    assert checks["disk"].verdict == doctor.WARN and "/no/such/file" in checks["disk"].detail


@pytest.mark.parametrize(("usable", "allowed", "says"), [(2, 8, "quota"), (2, 2, "affinity")])
def test_processors_that_may_not_be_used(monkeypatch, usable, allowed, says):
    monkeypatch.setattr(machine, "cpu_count", lambda: usable)
    monkeypatch.setattr(machine, "allowed_cpus", lambda: allowed)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    check = doctor._processors()
    assert check.verdict == doctor.OK and "2 of 64" in check.detail and says in check.detail


def test_memory_within_a_limit(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 3 << 30)
    monkeypatch.setattr(machine, "installed_memory", lambda: 64 << 30)
    monkeypatch.setattr(machine, "total_memory", lambda: 4 << 30)
    assert "limited by a cgroup to 4096 MiB" in doctor._memory().detail
    monkeypatch.setattr(machine, "total_memory", lambda: 64 << 30)
    assert doctor._memory().detail == "3072 MiB available"
