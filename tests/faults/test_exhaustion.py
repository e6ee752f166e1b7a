# SPDX-License-Identifier: MIT
"""Memory, address space and file descriptors that run out under the library, at every place where it asks.

exhaustion.c fails one of its calls. Each shortage ends in an error that says what happened, or in a fallback
that is announced; the process lives, and what runs next is exact. Each test runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp.llama_cpp as api
import pytest

from rotary_llamacpp import _native
from tests.support.compiled import Shortage
from tests.support.paged import assert_equal, attempt, make
from tests.support.processes import Apart, apart
from tests.support.tracing import OPTIONS, trace

pytestmark = pytest.mark.model

PROMPT = 24
PLAIN = {"n_ubatch": 16}
DIRECT = {"budget": "50%", "store": "direct"}


# ---- address space and files, while a model is opened


def open_with_failures(model, rotary, n):
    """Opens the model again and again, with the 1st, 2nd, ... call failing, and the `n` from there on.

    Each time: what came of it, the figures, and how many calls failed; to the first time that none did.
    """
    shortage = Shortage()
    make(model, rotary, **PLAIN).close()  # what is done once is done
    found = []
    while not found or found[-1][2] > 0:
        shortage.begin(at=len(found) + 1, n=n)
        try:
            llama = make(model, rotary, **PLAIN)
        except Exception as error:
            found.append(((type(error).__name__, str(error)), None, shortage.end()))
            continue
        n_failed = shortage.end()
        found.append((trace(llama, PROMPT, 4), llama.rotary_stats(), n_failed))
        llama.close()
    return found


def check_all(found, stock, least):
    """That every shortage was survived, exactly or with an error of one line; what was said in each."""
    assert len(found) > least, "there were calls to fail"
    texts = []
    for result, stats, _ in found:
        if isinstance(result, tuple):
            kind, text = result
            assert kind in ("LibraryError", "ReadError"), result
            assert "\n" not in text and text.count("; ") >= 1, text
            texts.append(text)
        else:
            assert_equal(result, stock)
            texts.append("; ".join(stats["notices"]))
    assert found[-1][1]["store"] == "direct" and not found[-1][1]["notices"], "the last had no shortage"
    return texts


@pytest.mark.parametrize("n", [1, 1 << 30], ids=["once", "from there on"])
@pytest.mark.parametrize("shape", [{}, {"shards": 3}], ids=["one file", "shards"])
def test_address_space(native, synthetic, stock_trace, short_of, shape, n):
    model = synthetic(type="q8_0", **shape)
    stock = stock_trace(model, n_prompt=PROMPT, n_decode=4, **PLAIN)
    found = apart(open_with_failures, model, DIRECT, n, environment=short_of("mmap"))
    texts = check_all(found, stock, 8)
    fallbacks = [text for (_, stats, _), text in zip(found, texts, strict=True) if stats["store"] != "direct"]
    assert fallbacks and all("paged through the page cache" in text for text in fallbacks)
    assert any("weights that are not experts" in text for text in texts)


def test_files(native, synthetic, stock_trace, short_of):
    model = synthetic(type="q8_0")
    stock = stock_trace(model, n_prompt=PROMPT, n_decode=4, **PLAIN)
    for n in (1, 1 << 30):
        found = apart(open_with_failures, model, DIRECT, n, environment=short_of("open"))
        texts = check_all(found, stock, 1)
        for (_, stats, n_failed), text in zip(found, texts, strict=True):
            if n_failed and stats["store"] != "direct":
                assert "cannot be read from the file directly" in text or "page cache" in text


# ---- memory


def run_from_every_place(model, rotary):
    """Runs with the first allocation of each place in the library failing, and the run after each.

    The last line on stderr names the place.
    """
    shortage = Shortage()
    llama = make(model, rotary, **PLAIN)
    shortage.begin()
    trace(llama, PROMPT, 4)
    shortage.end()
    found = []
    site = 1
    while site <= shortage.sites:
        print(f"place {site} at {shortage.place(site):#x}", file=sys.stderr, flush=True)
        shortage.begin(site=site)
        result = attempt(trace, llama, PROMPT, 4)
        if shortage.end():
            found.append((site, result, attempt(trace, llama, PROMPT, 4)))
        site += 1
    return found


def check_error(result):
    kind, text = result
    assert kind in ("LibraryError", "ReadError", "RotaryError", "ValueError"), result
    assert text and "\n" not in text, result


@pytest.mark.slow
@pytest.mark.parametrize("store, io", [("mmap", "threads"), ("direct", "threads"), ("direct", "uring")])
def test_memory_while_graphs_run(native, synthetic, stock_trace, short_of, store, io):
    model = synthetic(type="q8_0", layers=2, experts=8)
    stock = stock_trace(model, n_prompt=PROMPT, n_decode=4, **PLAIN)
    environment = short_of("malloc", io)
    found = apart(run_from_every_place, model, {"budget": "50%", "store": store}, environment=environment)
    assert len(found) > 5, "there were places"
    for _, result, after in found:
        if isinstance(result, tuple):
            check_error(result)
        else:
            assert_equal(result, stock)
        assert_equal(after, stock)


# ---- the end of a process


def exit_with_a_model(path, store):
    """A model that is freed by a handler older than the library: after the library's own statics are gone."""
    libc = ctypes.CDLL(None)
    kept = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def free(_):
        for context, model in kept:
            api.llama_free(context)
            api.llama_model_free(model)
        print("freed", flush=True)

    libc.__cxa_atexit(free, None, None)
    library = _native.load()
    devices = library.device_list([0])
    for name in (path, path):
        params = api.llama_model_default_params()
        params.devices, params.n_gpu_layers = ctypes.cast(devices, ctypes.c_void_p), -1
        model = api.llama_model_load_from_file(os.fsencode(name), params)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = OPTIONS["n_ctx"], 1, 1
        context = api.llama_init_from_model(model, settings)
        tokens = (api.llama_token * 4)(3, 4, 5, 6)
        assert api.llama_decode(context, api.llama_batch_get_one(tokens, 4)) == 0
        kept.append((context, model))
    libc.exit(0)


@pytest.mark.parametrize("store", ["direct", "mmap"])
def test_models_freed_at_the_end(native, synthetic, store):
    # What is freed is overwritten at once, so that its use shows.
    environment = {
        "ROTARY_BUDGET": "min",
        "ROTARY_STORE": store,
        "MALLOC_PERTURB_": "165",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    }
    with Apart(exit_with_a_model, synthetic(type="q8_0"), store, environment=environment) as run:
        said, errors = run.process.communicate(timeout=120)
        assert (run.process.returncode, said) == (0, "freed\n"), errors[-2000:]
