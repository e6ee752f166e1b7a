# SPDX-License-Identifier: MIT
"""Loading: unsuitable libraries are refused by name, in one line. Errors and devices of the C API."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
from pathlib import Path

import pytest

from rotary_llamacpp import pinned
from rotary_llamacpp.errors import DeviceError, LibraryError, RotaryError, VersionError
from rotary_llamacpp.host import machine
from rotary_llamacpp.native import binding as _native
from tests.support import ROOT
from tests.support.compiled import preload
from tests.support.processes import python

OTHER_MACHINE = {"x86_64": 183}.get(platform.machine(), 62)  # aarch64, or x86_64


def refused(path, kind):
    """Load a library that must be refused; returns the text of the error."""
    with pytest.raises(kind) as caught:
        _native.Library(path)
    text = str(caught.value)
    assert "\n" not in text and text.count("; ") >= 1, text
    return text


@pytest.fixture
def patched(native, tmp_path):
    """Make a copy of the library with some bytes replaced by others of the same length."""

    def make(old: bytes, new: bytes) -> Path:
        data = native.path.read_bytes()
        assert old in data and len(old) == len(new)
        path = tmp_path / "libggml-rotary.so"
        path.write_bytes(data.replace(old, new))
        return path

    return make


def test_missing():
    assert "no/such.so" in refused(Path("no/such.so"), LibraryError)


def test_not_a_library(tmp_path):
    path = tmp_path / "libggml-rotary.so"
    path.write_bytes(b"x" * 100)
    assert "not an ELF" in refused(path, LibraryError)
    path.write_bytes(b"")
    assert "not an ELF" in refused(path, LibraryError)


def test_built_for_another_cpu(native, tmp_path):
    data = bytearray(native.path.read_bytes())
    data[18:20] = OTHER_MACHINE.to_bytes(2, "little")
    path = tmp_path / "libggml-rotary.so"
    path.write_bytes(data)
    text = refused(path, LibraryError)
    assert "aarch64" in text or "x86_64" in text


@pytest.mark.parametrize("uname", ["aarch64", "loongarch64", "riscv64", ""])
def test_uname_decides_nothing(native, monkeypatch, uname):
    """Under 32-bit programs a 64-bit kernel reports its own machine, and new machines have new names."""
    monkeypatch.setattr(platform, "machine", lambda: uname)
    machine.check_library_machine(native.path)


def test_a_program_that_cannot_be_read(native, monkeypatch):
    monkeypatch.setattr(machine, "_PROGRAM", Path("/nowhere"))
    machine.check_library_machine(native.path)


def test_damaged_library(native, tmp_path):
    path = tmp_path / "libggml-rotary.so"
    path.write_bytes(native.path.read_bytes()[:5000])
    assert "truncated" in refused(path, LibraryError)


def test_another_ggml(native, patched):
    version = pinned.GGML_VERSION.encode()
    other = version[:-1] + b"9"
    text = refused(patched(version + b"\0", other + b"\0"), VersionError)
    assert pinned.GGML_VERSION in text and other.decode() in text


def test_another_llama_cpp(native, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.99")
    text = refused(native.path, VersionError)
    assert "0.3.99" in text and pinned.LLAMA_CPP_PYTHON in text


def test_another_abi(native, monkeypatch):
    monkeypatch.setattr(_native, "ABI_VERSION", 99)
    assert "ABI" in refused(native.path, VersionError)


def test_another_struct(native, monkeypatch):
    declarations = _native.api_declarations().replace("uint64_t page_us;", "uint64_t page_us; uint64_t more;")
    monkeypatch.setattr(_native, "api_declarations", lambda: declarations)
    assert "rotary_stats" in refused(native.path, VersionError)


# Bodies of the function that replaces ggml's own in the child where the library tries the CPU backend.
TRIALS = {
    "illegal": "raise(SIGILL); return 0;",
    "killed": "raise(SIGKILL); return 0;",
    "failed": "return -1;",
}


@pytest.fixture
def trial(native, tmp_path):
    """Load the library in a process whose trial runs `body` instead of a graph; returns the last line."""

    compute = "int ggml_backend_graph_compute(void * backend, void * graph)"

    def run(body: str, before: str = "", function: str = compute) -> str:
        source = tmp_path / "trial.c"
        source.write_text(f"#include <signal.h>\n{function} {{ {body} }}\n")
        program = f"""if True:
            {before}
            from rotary_llamacpp.native import binding as _native
            from rotary_llamacpp.errors import LibraryError
            try:
                print(_native.load().device_count(), "devices")
            except LibraryError as error:
                print(error)"""
        ran = python(program, **preload(tmp_path, source))
        assert ran.stderr == ""
        return ran.stdout.splitlines()[-1]

    return run


def test_a_processor_that_llama_cpp_was_not_built_for(trial):
    text = trial(TRIALS["illegal"])
    assert "illegal instruction" in text and text.count("; ") == 2
    assert re.search(r"; it was compiled for \w+", text), "in ggml's words"


def test_only_the_child_runs_the_cpu_backend(trial):
    """The CPU backend's first call fills tables, with any instructions that it was compiled to use."""
    text = trial(TRIALS["illegal"], function="void * ggml_backend_cpu_reg(void)")
    assert "illegal instruction" in text


def test_handlers_of_the_application_do_not_hide_it(trial):
    assert "illegal instruction" in trial(TRIALS["illegal"], "import faulthandler; faulthandler.enable()")


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_trial_that_proves_nothing_refuses_nothing(trial, how):
    assert trial(TRIALS[how]).endswith(" devices")


def test_no_child_to_try_in(trial):
    """With SIGCHLD ignored, the system reaps children, and they leave no exit status."""
    ignore = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    assert trial(TRIALS["failed"], ignore).endswith(" devices")


def test_loading_is_done_once(native):
    assert _native.load() is native is _native.loaded()


def test_library_path(monkeypatch):
    monkeypatch.setenv("ROTARY_LIBRARY", "some.so")
    assert _native.library_path() == Path.cwd() / "some.so"
    monkeypatch.delenv("ROTARY_LIBRARY")
    assert _native.library_path() == ROOT / "rotary_llamacpp" / "lib" / "libggml-rotary.so"


def test_header_ships_and_agrees(native):
    header = ROOT / "native" / "include" / "rotary.h"
    shipped = ROOT / "rotary_llamacpp" / "include" / "rotary.h"
    assert "rotary_pool_open" in _native.api_declarations()
    assert shipped.read_bytes() == header.read_bytes(), "stale copy; build again"


def test_pinned_version_is_the_installed_one():
    assert importlib.metadata.version("llama-cpp-python") == pinned.LLAMA_CPP_PYTHON


def test_pinned_imports_nothing():
    namespace = {}
    exec((ROOT / "rotary_llamacpp" / "pinned.py").read_text(), {"__builtins__": {}}, namespace)
    assert set(namespace) >= {"LLAMA_CPP_PYTHON", "GGML_VERSION"}


def test_devices(native):
    assert native.device_count() >= 1
    assert native.name(0) == "ROTARY0"
    assert (
        native.devices_for(None)
        == native.devices_for(native.default_inner[0])
        == native.devices_for("cpu")
        == [0]
    )
    with pytest.raises(DeviceError, match="NOSUCH0") as caught:
        native.devices_for("NOSUCH0")
    assert native.default_inner[0] in str(caught.value), "it names the devices there are"
    assert [native.inner(0)] == native.default_inner, "a refusal changes nothing"
    with pytest.raises(DeviceError, match="CPU: no ROTARY device is left for it, there are 1"):
        native.devices_for("CPU, CPU")


def test_an_error_is_not_printed_too(native, capfd):
    with pytest.raises(RotaryError):
        native.devices_for("NOSUCH0")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_list_without_our_devices(native):
    chosen = native.devices_without_rotary()
    assert chosen[len(chosen) - 1] is None, "NULL-terminated"
    assert native.device_list([0])[0] not in list(chosen)


def test_memory_of_this_machine():
    assert 0 < machine.available_memory() <= machine.total_memory() <= machine.installed_memory()
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, before[1]))
    assert machine.memlock_limit() == 4096
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
