# SPDX-License-Identifier: MIT
"""Paging to a CUDA device, compared with the same model resident there. Skipped without such a device.

Decode runs the same kernels on the same shapes, so its logits are equal to the bit. A prompt in waves
multiplies fewer rows at a time, for which ggml-cuda chooses other kernels: at least half of the positions
agree to NMSE 1e-4, and all but two choose the same token.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.support import HANG_S, ROOT
from tests.support.processes import apart
from tests.support.tracing import OPTIONS, prompt_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.model]

N_PROMPT, N_DECODE = 48, 24
MODEL = {"type": "q4_0", "embd": 512, "ff": 512}


@pytest.fixture(scope="module", autouse=True)
def card():
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if "GPU 0" not in found:
        pytest.skip("no NVIDIA GPU")


def run(model, configs, one_by_one, options):
    """For each config of ``rotary``: the logits of a prompt and of fixed tokens after it, and statistics."""
    from rotary_llamacpp import Llama

    found = []
    for config in configs:
        environment = config.pop("environment", {}) if config else {}
        os.environ.update(environment)
        llama = Llama(str(model), rotary=config, n_gpu_layers=-1, **{**OPTIONS, "n_ctx": 512, **options})
        tokens = prompt_tokens(llama.n_vocab(), N_PROMPT + N_DECODE)
        split = 1 if one_by_one else N_PROMPT
        llama.eval(tokens[:split])
        for token in tokens[split:]:
            llama.eval([token])
        found.append((llama.scores[: len(tokens)].copy(), llama.rotary_stats()))
        llama.close()
        for name in environment:
            del os.environ[name]
    return found


def nmse(found, expected):
    """Median NMSE over positions: a router that breaks a near tie differently changes a whole position."""
    return float(np.median(((found - expected) ** 2).sum(axis=1) / (expected**2).sum(axis=1)))


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_k_m", "f16"])
def test_decode_is_equal_to_resident(native, synthetic, kind):
    model = synthetic("test", **{**MODEL, "type": kind})
    budgets = [{"budget": budget} for budget in ("min", "50%", "100%")]
    ways = {
        **dict(zip(("min", "50%", "100%"), budgets, strict=True)),
        "host": {"budget": "50%", "environment": {"ROTARY_DEVICE_LOOKUPS": "0"}},
        "ring": {"budget": "50%", "pin": "off"},
        "no prefetch": {"budget": "50%", "prefetch": False},
    }
    (resident, _), *paged = apart(run, model, [None, *ways.values()], True, {})
    assert np.isfinite(resident).all() and resident.std() > 0.1
    found = dict(zip(ways, paged, strict=True))
    for way, (logits, stats) in found.items():
        assert stats["inner_device"].startswith("CUDA"), way
        assert (logits == resident).all(), (way, np.abs(logits - resident).max())
        on_device = way in ("min", "50%", "no prefetch")
        assert (stats["prefetched"] > 0 < stats["predicted_right"]) == (way in ("min", "50%")), way
        assert (stats["device_lookups"] == stats["lookups"] > 0) == on_device, way
        if way != "100%":
            assert stats["misses"] > 0 and stats["hits"] + stats["misses"] == stats["requests"]
    same = ("lookups", "requests", "hits", "misses", "evictions", "bytes_paged")
    device, by_host = found["no prefetch"][1], found["host"][1]
    assert {name: device[name] for name in same} == {name: by_host[name] for name in same}


@pytest.mark.parametrize("budget", ["min", "50%"])
def test_prompts_in_waves(native, synthetic, budget):
    model = synthetic("test", **MODEL)
    configs = [
        None,
        {"budget": budget},
        {"budget": budget, "pin": "off"},
        {"budget": budget, "store": "direct"},
    ]
    (resident, _), *paged = apart(run, model, configs, False, {"n_ubatch": 32})
    for logits, stats in paged:
        assert stats["waves"] > 0
        assert nmse(logits, resident) < 1e-4
        assert (logits.argmax(axis=1) != resident.argmax(axis=1)).sum() <= 2


def run_in_what_is_left(model, left):
    """Run with budget "auto" while all but `left` bytes of the card's memory are taken."""
    load_llama_cpp()
    cuda = ctypes.CDLL(next(path for path in loaded_libraries() if "libcudart.so" in path))
    free, total, taken = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    assert cuda.cudaMalloc(ctypes.byref(taken), ctypes.c_size_t(free.value - left)) == 0
    return run(model, [{"budget": "auto"}], True, {})


def load_llama_cpp():
    import llama_cpp

    llama_cpp.llama_backend_init()


def loaded_libraries():
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[-1] for line in maps if ".so" in line})


def test_a_card_that_is_full(native, synthetic):
    # The margin that "auto" leaves is larger than the free memory: it takes the minimum of slots, not none.
    model = synthetic("test", **{**MODEL, "experts": 64, "layers": 8})
    [(logits, stats)] = apart(run_in_what_is_left, model, 600 << 20)
    assert np.isfinite(logits).all()
    assert stats["path"] == "slots" and stats["slot_bytes"] < stats["expert_bytes"]


def test_sanitizer(native, synthetic):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        pytest.skip("no compute-sanitizer")
    model = synthetic("test", **{**MODEL, "layers": 2})
    code = f"from tests.gpu.test_gpu import run; run({str(model)!r}, [{{'budget': '50%'}}], False, {{}})"
    # Calls that the system refuses, such as read-only pinning, are not errors of the library.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [tool, *options, sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
