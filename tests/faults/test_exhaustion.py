# SPDX-License-Identifier: MIT
"""Memory, address space and file descriptors that run out at every place where the library asks for them.

exhaustion.c fails one of the library's calls. Each shortage ends in an error that says what happened, or in
an announced fallback; the process survives, and the next run is exact. Each test has a process of its own.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys

import llama_cpp.llama_cpp as api
import pytest

from rotary_llamacpp import policies, predictors
from rotary_llamacpp.native import binding as _native
from tests.support.compiled import Disk, Shortage
from tests.support.paged import assert_equal, attempt, make
from tests.support.processes import Apart, apart, has_io_uring
from tests.support.tracing import OPTIONS, trace

pytestmark = pytest.mark.model

PROMPT = 24
PLAIN = {"n_ubatch": 16}
DIRECT = {"budget": "50%", "store": "direct"}


# ---- address space and files, while a model is opened


def open_with_failures(model, rotary, n):
    """Open the model again and again, failing `n` calls from the 1st, 2nd, ... on, until no call failed.

    Returns for each time the result, the statistics, and how many calls failed.
    """
    shortage = Shortage()
    make(model, rotary, **PLAIN).close()  # initialisation that happens once per process
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
    """Check that each shortage ended in exact logits or in an error of one line; returns what was said."""
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


def fail_each_place(shortage, run, known=0):
    """Run with the first allocation of each place in the library failing; returns that run and the next.

    The first `known` places are left out. The last line on stderr names the place.
    """
    found = []
    site = known + 1
    while site <= shortage.sites:
        print(f"place {site} at {shortage.place(site):#x}", file=sys.stderr, flush=True)
        shortage.begin(site=site)
        result = attempt(run)
        if shortage.end():
            found.append((site, result, attempt(run)))
        site += 1
    return found


def run_from_every_place(model, rotary):
    shortage = Shortage()
    llama = make(model, rotary, **PLAIN)
    run = functools.partial(trace, llama, PROMPT, 4)
    shortage.begin()
    run()
    shortage.end()
    return fail_each_place(shortage, run)


def open_and_run(model, rotary, threads_left=-1, enter_error=0, n_prompt=PROMPT):
    disk = Disk()
    disk.set(threads_left=threads_left, enter_error=0)
    llama = make(model, rotary, **PLAIN)
    disk.set(enter_error=enter_error)
    try:
        return trace(llama, n_prompt, 4), llama.rotary_stats()
    finally:
        llama.close()


def open_from_every_place(model, rotary, ways):
    """Open the model in each of these ways of reading, then fail each place that only the last reaches."""
    shortage = Shortage()
    for io, threads_left in ways:
        os.environ["ROTARY_IO"] = io
        known = shortage.sites
        run = functools.partial(open_and_run, model, rotary, threads_left)
        shortage.begin()
        usual = run()
        shortage.end()
    return usual, fail_each_place(shortage, run, known)


def open_with_a_ring_that_stops(model, rotary, n_calls):
    """Open the model with a ring that fails at the first read, and then fail one allocation after that.

    A single token's experts are read in place, so that a lost read would be waited for.
    """
    os.environ["ROTARY_IO"] = "uring"
    shortage = Shortage()
    run = functools.partial(open_and_run, model, rotary, enter_error=errno.EPERM, n_prompt=1)
    usual, found = run(), []
    for call in range(1, n_calls + 1):
        print(f"call {call}", file=sys.stderr, flush=True)
        shortage.begin(at=call, ring=1, on=0)
        result = attempt(run)
        found += [(call, result, attempt(run))] if shortage.end() else []
    return usual, found


def check_error(result):
    kind, text = result
    assert kind in ("LibraryError", "ReadError", "RotaryError", "ValueError"), result
    assert "\n" not in text, result
    assert "memory" in text or text.startswith("Failed to "), result  # llama-cpp-python's message


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


THREADS, FEW_THREADS, URING = ("threads", -1), ("threads", 3), ("uring", -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run_each", "what"),
    [
        pytest.param(open_from_every_place, [THREADS], id="threads"),
        pytest.param(open_from_every_place, [THREADS, FEW_THREADS], id="few threads"),
        pytest.param(open_from_every_place, [THREADS, URING], id="what only uring asks for"),
        pytest.param(open_with_a_ring_that_stops, 30, id="a ring that stops"),
    ],
)
def test_memory_while_a_model_opens(native, synthetic, stock_trace, short_of, disk, run_each, what):
    if what not in ([THREADS], [THREADS, FEW_THREADS]) and not has_io_uring():
        pytest.skip("no io_uring here")
    model = synthetic(type="q8_0", layers=2, experts=8)
    n_prompt = 1 if run_each is open_with_a_ring_that_stops else PROMPT
    stock = stock_trace(model, n_prompt=n_prompt, n_decode=4, **PLAIN)
    environment = short_of("malloc")
    environment["LD_PRELOAD"] += ":" + disk["threads"]["LD_PRELOAD"]
    with Apart(run_each, model, DIRECT, what, environment=environment) as run:
        usual, found = run.result(600)
    assert found, "there were places"
    expert_bytes, notices = usual[1]["expert_bytes"], set(usual[1]["notices"])
    for _, result, after in found:
        if isinstance(result[0], str):
            check_error(result)
        else:
            assert_equal(result[0], stock)
            assert result[1]["expert_bytes"] == expert_bytes, "all experts are paged"
            assert result[1]["store"] == "direct" or set(result[1]["notices"]) > notices
        assert_equal(after[0], stock)
        assert after[1]["store"] == "direct"


def resolve_in_slots(library):
    """All that a slot table without a pool can be asked for."""
    c, ffi = library.c, library.ffi
    slots = c.rotary_slots_new(8, 2)
    library.check(c.rotary_last_status())
    slot_ids, loads = ffi.new("int32_t[]", 2), ffi.new("rotary_load[]", 2)
    try:
        n_loads = [c.rotary_slots_resolve(slots, ids, 2, slot_ids, loads) for ids in ([0, 1], [2, 3], [4, 4])]
        reserved = c.rotary_slots_reserve(slots, 5, [4], 1)
        library.check(c.rotary_last_status())
        library.check(c.rotary_slots_end_reservation(slots, 5, True))
        return n_loads, reserved
    finally:
        c.rotary_slots_free(slots)


def replay_in_a_cache(library, policy):
    c, ffi = library.c, library.ffi
    cache = c.rotary_cache_new(policy.encode(), ffi.NULL, 2, 8, [3, 3], 1, 2)
    library.check(c.rotary_last_status())
    try:
        misses, slot_ids, loads = (
            ffi.new("int32_t[]", 6),
            ffi.new("int32_t[]", 4),
            ffi.new("rotary_load[]", 8),
        )
        rows = [0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 4, -1]
        status = c.rotary_cache_replay(cache, 6, [0, 1] * 3, rows, ffi.NULL, 2, misses)
        n_loads = c.rotary_cache_resolve(cache, 0, [1, 2, 1, 2], ffi.NULL, 2, 2, slot_ids, loads)
        library.check(c.rotary_last_status())
        return status, ffi.unpack(misses, 6), n_loads
    finally:
        c.rotary_cache_free(cache)


def predict_without_a_pool(library, predictor):
    c, ffi = library.c, library.ffi
    foresight = c.rotary_foresight_new(predictor.encode(), ffi.NULL, 2, 8)
    library.check(c.rotary_last_status())
    try:
        experts, shares = ffi.new("int32_t[]", 2), ffi.new("float[]", [0.5] * 64)
        c.rotary_foresight_learn(foresight, 1, shares, shares, shares, 10)
        for layer in (0, 1, 0):
            c.rotary_foresight_note(foresight, layer, [0, 1, 2, 3], 2, 2)
        n = c.rotary_foresight_name(foresight, 0, 1, experts, 2)
        library.check(c.rotary_last_status())
        return ffi.unpack(experts, n)
    finally:
        c.rotary_foresight_free(foresight)


def ask_from_every_place(function, *args):
    shortage, library = Shortage(), _native.load()

    def run():
        library.c.rotary_clear_error()
        return function(library, *args)

    shortage.begin()
    usual = run()
    shortage.end()
    return usual, fail_each_place(shortage, run)


@pytest.mark.parametrize(
    "call",
    [(resolve_in_slots,)]
    + [(replay_in_a_cache, policy) for policy in policies.REFERENCES]
    + [(predict_without_a_pool, predictor) for predictor in predictors.FROM_ROUTINGS],
    ids=lambda call: "-".join([call[0].__name__, *call[1:]]),
)
def test_memory_without_a_pool(native, short_of, call):
    usual, found = apart(ask_from_every_place, *call, environment=short_of("malloc"))
    assert found, "there were places"
    for site, result, after in found:
        assert (result[0], after) == ("LibraryError", usual), (site, result)
        assert result[1].startswith("memory: none is left"), (site, result)


# ---- the end of a process


def exit_with_models(path):
    """Free models in an exit handler that runs after the library's own static objects are destroyed."""
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
    for _ in range(2):
        params = api.llama_model_default_params()
        params.devices, params.n_gpu_layers = ctypes.cast(devices, ctypes.c_void_p), -1
        model = api.llama_model_load_from_file(os.fsencode(path), params)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = OPTIONS["n_ctx"], 1, 1
        context = api.llama_init_from_model(model, settings)
        tokens = (api.llama_token * 4)(3, 4, 5, 6)
        assert api.llama_decode(context, api.llama_batch_get_one(tokens, 4)) == 0
        kept.append((context, model))
    libc.exit(0)


@pytest.mark.parametrize("store", ["direct", "mmap"])
def test_models_freed_at_the_end(native, synthetic, store):
    # glibc overwrites freed memory at once, so that use after free shows.
    environment = {
        "ROTARY_BUDGET": "min",
        "ROTARY_STORE": store,
        "MALLOC_PERTURB_": "165",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    }
    with Apart(exit_with_models, synthetic(type="q8_0"), environment=environment) as run:
        said, errors = run.process.communicate(timeout=120)
        assert (run.process.returncode, said) == (0, "freed\n"), errors[-2000:]
