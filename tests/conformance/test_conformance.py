# SPDX-License-Identifier: MIT
"""Upstream's own tests and programs, unchanged, on ROTARY0 with fewer slots than they use experts.

The programs come from tests/conformance (`make conformance`). test-llama-archs compares every architecture
with the plain CPU; a small NMSE passes. test-backend-ops does so for single operations. The inner device is
the CPU, or llama.cpp's RPC server on loopback, whose memory, like a GPU's, no pointer can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support import HANG_S, ROOT, no_hang

pytestmark = [pytest.mark.conformance, pytest.mark.slow]

PROGRAMS = ROOT / "build" / "conformance" / "bin"
LIBRARY = ROOT / "rotary_llamacpp" / "lib" / "libggml-rotary.so"

# Configurations that test-llama-archs of the pinned llama.cpp runs on one device. It lists 57 of MoE models
# and skips one on every device (arch_supported()).
N_CONFIGURATIONS = 133
N_MOE = 57
MOE_LEFT_OUT = ["llama-embed"]

# Leaves out the cases whose weights test-backend-ops takes minutes to quantise.
SMALL_OPS = r"^(?!.*(m=4096|m=2880|k=2048|k=4096|n_mats=1024|iq3_s.*n_mats=512))"
FEW_TYPES = SMALL_OPS + r".*type_a=(f16|q4_0|q4_K|mxfp4),"

TAIL_CHARS = 6000


@pytest.fixture(scope="module")
def rpc_server() -> Iterator[str]:
    """Endpoint, for ROTARY_INNER, of an RPC server on a free port of the loopback interface."""
    for _ in range(10):  # another process may take the port meanwhile
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(PROGRAMS / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with no_hang():
            while server.poll() is None and not listens(port):
                time.sleep(0.05)
        if server.poll() is None:
            break
    else:
        pytest.fail(f"ggml-rpc-server: ended with {server.returncode}, ten times")
    try:
        yield f"rpc://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def run(
    program: str, *args: str, preload: str | None = None, backend: bool = True, **rotary: str
) -> tuple[str, str]:
    """Run a program with the backend and the given ROTARY_<NAME>s; returns its stdout and stderr.

    ROTARY_*, GGML_* and LLAMA_* variables of this process are not passed on.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("ROTARY_", "GGML_", "LLAMA_"))
    }
    environment["OMP_WAIT_POLICY"] = "passive"  # else waiting threads spin, for minutes on a busy machine
    if backend:
        environment |= {"GGML_BACKEND_PATH": str(LIBRARY), "ROTARY_STATS": "1"}
        environment |= {f"ROTARY_{key.upper()}": value for key, value in rotary.items()}
    if preload:
        environment["LD_PRELOAD"] = str(PROGRAMS / f"lib{preload}.so")
    try:
        result = subprocess.run(
            [str(PROGRAMS / program), *args],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HANG_S,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        output = (err.stdout or b"") + (err.stderr or b"")
        pytest.fail(
            f"{program}: not done in {HANG_S} s; it said last:\n{tail(output.decode(errors='replace'))}"
        )
    # Remove llama.cpp's colours.
    stdout, stderr = (
        re.sub(r"\x1b\[[0-9;]*m", "", text.decode(errors="replace"))
        for text in (result.stdout, result.stderr)
    )
    if result.returncode != 0:
        pytest.fail(f"{program}: exit status {result.returncode}; it said last:\n{tail(stdout + stderr)}")
    return stdout, stderr


def tail(text: str) -> str:
    return text[-TAIL_CHARS:]


def counters(stderr: str) -> dict[str, int]:
    """The counters that ROTARY_STATS prints, summed over the pools."""
    lines = [line for line in stderr.splitlines() if line.startswith("rotary:") and "misses=" in line]
    assert lines, f"no line of counters; stderr ends with:\n{tail(stderr)}"
    total: dict[str, int] = {}
    for key, value in re.findall(r"(\w+)=(\d+)\b", "\n".join(lines)):
        total[key] = total.get(key, 0) + int(value)
    return total


# ---- test-llama-archs ----------------------------------------------------------------------------


def check_archs(**rotary: str) -> dict[str, int]:
    """Check that every configuration passes on ROTARY0 with two slots for eight experts; returns counters."""
    stdout, stderr = run(
        "test-llama-archs", "-b", "ROTARY0", "-s", "1", preload="preload", budget="min", **rotary
    )
    # | qwen3moe| AMD EPYC|   MoE|   OK (0.00e+00)|    OK|
    rows = re.findall(r"^\| *([\w-]+)\|[^|]*\| *(MoE|Dense)\| *(\w+)[^|]*\| *(\w*)", stdout, re.MULTILINE)
    ran = [row for row in rows if row[2] != "SKIP"]  # upstream has no fixture for these on any device
    failed = [row for row in ran if row[2] != "OK" or row[3] not in ("OK", "SKIP")]
    assert not failed, f"failed: {failed}\n{tail(stdout)}"
    assert len(ran) == N_CONFIGURATIONS
    moe = [row for row in rows if row[1] == "MoE"]
    assert len(moe) == N_MOE and [row[0] for row in moe if row not in ran] == MOE_LEFT_OUT
    total = counters(stderr)
    assert "n_expert=8 n_slots=2 " in stderr and total["misses"] > 1000
    return total


def test_archs() -> None:
    total = check_archs(inner="CPU", direct="1")
    # Nearly all batches want more experts than there are slots; none of these may be paged in waves.
    assert total["waves"] == 0 and total["bypassed"] > 1000
    assert total["misses"] > total["bypassed"], "the smallest batches are paged"


def test_archs_in_waves() -> None:
    total = check_archs(inner="CPU", direct="0")
    assert total["waves"] > 0 and total["evictions"] > 0
    assert total["bypassed"] == 0


def test_archs_over_rpc(rpc_server: str) -> None:
    total = check_archs(inner=rpc_server)
    assert total["waves"] > 0 and total["evictions"] > 0
    assert total["bypassed"] == 0  # an RPC server cannot read the mapping


# ---- test-backend-ops ----------------------------------------------------------------------------


def check_ops(params: str, n_least: int, **rotary: str) -> dict[str, int]:
    """Check that the tests of MUL_MAT_ID with `params`, at least `n_least`, pass paged; returns counters."""
    stdout, stderr = run(
        *("test-backend-ops", "test", "-b", "ROTARY0", "-o", "MUL_MAT_ID,MUL_MAT_ID_FUSION", "-p", params),
        preload="preload_paged",
        **rotary,
    )
    passed, n_tests = (int(n) for n in re.findall(r"(\d+)/(\d+) tests passed", stdout)[0])
    assert passed == n_tests >= n_least, tail(stdout)
    assert "not supported" not in stdout
    return counters(stderr)


def test_ops() -> None:
    total = check_ops(SMALL_OPS, 900, inner="CPU", budget="min", direct="0")
    assert total["misses"] > 0 and total["waves"] > 0


def test_ops_over_rpc(rpc_server: str) -> None:
    total = check_ops(FEW_TYPES, 200, inner=rpc_server, budget="min")
    assert total["misses"] > 0 and total["waves"] > 0


# ---- stock programs ------------------------------------------------------------------------------


# llama-completion of a build without GGML_BACKEND_DL, such as this one, calls ggml_backend_load_all(), which
# reads GGML_BACKEND_PATH, only to look for a device by name. llama-bench always calls it.
MODEL = ["-m", str(ROOT / "models" / "tiny-moe-q8_0.gguf")]
GENERATE = [*MODEL, "-p", "In the beginning", "-n", "48", "--temp", "0", "-ngl", "99", "-t", "2", "-no-cnv"]
ON_ROTARY = ["-dev", "ROTARY0"]


def check_same(paged: str, stock: str) -> None:
    """Check that the texts are equal, except last words that llama.cpp may have lost (its issue 22142)."""
    n = min(len(paged.rstrip()), len(stock.rstrip()))
    assert paged[:n] == stock[:n]
    assert len(paged[:n].split()) >= 25


@pytest.mark.model
@pytest.mark.parametrize("store", ["mmap", "direct"])
@pytest.mark.parametrize("budget", ["min", "25%"])
def test_llama_completion(budget: str, store: str) -> None:
    stock, _ = run("llama-completion", *GENERATE, backend=False)
    paged, stderr = run("llama-completion", *GENERATE, *ON_ROTARY, budget=budget, store=store)
    check_same(paged, stock)
    total = counters(stderr)
    assert total["misses"] > 0 and total["evictions"] > 0
    assert (total["bytes_read"] > 0) == (store == "direct")


@pytest.mark.model
@pytest.mark.parametrize("store", ["mmap", "direct"])
def test_llama_completion_over_rpc(rpc_server: str, store: str) -> None:
    stock, _ = run("llama-completion", *GENERATE, "--no-repack", backend=False)
    paged, stderr = run(
        "llama-completion", *GENERATE, *ON_ROTARY, budget="25%", inner=rpc_server, store=store
    )
    check_same(paged, stock)
    total = counters(stderr)
    assert total["misses"] > 0 and (total["prefetch_used"] > 0) == (store == "direct")


@pytest.mark.model
def test_llama_bench() -> None:
    args = [*MODEL, "-ngl", "99", "-t", "2", "-p", "64", "-n", "16", "-r", "1", "-o", "json"]
    stdout, stderr = run("llama-bench", *args, budget="25%")
    results = json.loads(stdout)
    assert [(result["n_prompt"], result["n_gen"]) for result in results] == [(64, 0), (0, 16)]
    assert all(result["avg_ts"] > 0 for result in results)
    assert counters(stderr)["misses"] > 0
