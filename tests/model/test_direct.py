# SPDX-License-Identifier: MIT
"""Direct reads change no bit: all logits equal stock's, and the statistics tell what was read.

Covers layouts of files and of weights, ways of reading, small staging, and several users at once.
test_direct_faults.py has slow and broken disks.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
import threading
from pathlib import Path

import llama_cpp.llama_cpp as llama_api
import numpy as np
import pytest

from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.host import file_systems
from tests.support import HANG_S, shards
from tests.support.paged import assert_equal, logits, make, notices, paged_trace, second_context
from tests.support.processes import Apart, apart, expected_io, reads_directly
from tests.support.tracing import trace

pytestmark = pytest.mark.model

LONG = 100
DIRECT = {"budget": "min", "store": "direct"}
PLAIN = {"n_ubatch": 32}


@pytest.fixture(params=["threads", "io_uring"])
def io(request, monkeypatch):
    """Choose how reads are made, for pools that are sized from now on."""
    monkeypatch.setenv("ROTARY_IO", request.param)
    return expected_io(request.param)


def check_figures(stats, io=None):
    """Check what is true of every run that pages by direct reads."""
    assert stats["store"] == "direct" and stats["io"] in ("uring", "threads")
    assert io is None or stats["io"] == io
    assert stats["resident_bytes"] > 0, "weights that are not experts have left the page cache"
    assert stats["bypassed"] == 0, "nothing is computed from a mapping that is gone"
    assert stats["reads"] > 0 and stats["bytes_read"] >= stats["bytes_paged"] >= 0
    assert stats["read_us"] > 0
    assert 0 <= stats["predicted_right"] <= stats["predicted"]
    assert 0 <= stats["late_hits"] <= stats["prefetch_used"] <= stats["prefetched"]
    assert stats["prefetch_used"] <= stats["misses"]


# ---- layouts


LAYOUTS = {
    "q4_0": ("test", {"type": "q4_0"}, [True, False]),  # repacked, or not
    "q4_k_m": ("test", {"type": "q4_k_m"}, [True, False]),  # layers of different sizes
    "f16": ("test", {"type": "f16"}, [True]),
    "biases": ("test-gpt-oss", {"type": "q8_0"}, [True]),
    "mxfp4": ("test-gpt-oss", {"type": "mxfp4"}, [True]),
    "shared": ("test-shared", {"type": "q4_0"}, [True]),  # gate and up in two tensors, and a shared expert
    "fused": ("test-shared", {"type": "q4_0", "fused": True}, [True]),  # gate and up in one tensor
    "shards": ("test", {"type": "q8_0", "shards": 3}, [True]),
    "odd": ("test", {"type": "q4_0", "experts": 15, "layers": 3, "vocab": 515}, [True]),  # odd numbers
}


@pytest.mark.parametrize(
    ("layout", "repack"), [(name, repack) for name, (_, _, ways) in LAYOUTS.items() for repack in ways]
)
@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
def test_layouts(synthetic, exact, layout, budget, repack):
    # With minimal staging, prefetches stop wherever there is no more room, at any tensor of a layer.
    shape, options, _ = LAYOUTS[layout]
    model = synthetic(shape, **options)
    rotary = {"budget": budget, "store": "direct", "repack": repack, "staging": 1}
    stats = exact(model, LONG, rotary, **PLAIN)
    assert notices(stats) == []
    # Repacked slots, and experts that are no multiple of a sector, cannot be read in place.
    sizes = {
        tensor.n_bytes // tensor.shape[-1] for tensor in read_header(model).tensors if "_exps" in tensor.name
    }
    if budget == "100%" or stats["repacked"] or all(size % 512 for size in sizes):
        assert stats["bytes_in_place"] == 0
    elif all(size % 4096 == 0 for size in sizes):
        assert stats["bytes_in_place"] > 0
    if budget == "100%":
        assert (stats["store"], stats["path"], stats["misses"]) == ("direct", "resident", 0)
        assert stats["bytes_read"] >= stats["expert_bytes"], "every expert was read"
    else:
        check_figures(stats)
        assert stats["path"] == "slots" and stats["misses"] > 0 and stats["evictions"] > 0
        assert stats["prefetch_used"] > 0


def test_an_expert_at_the_end_of_a_file(synthetic, exact):
    # The read of the last expert is rounded up to whole blocks, past the end of its file.
    model = synthetic("test", type="q4_0", shards=4, vocab=600, experts=15)
    ends = []
    for path in shards(model):
        last = max(read_header(path).tensors, key=lambda tensor: tensor.offset)
        ends.append(("_exps" in last.name, path.stat().st_size % 512))
    assert any(is_expert and odd for is_expert, odd in ends), ends
    stats = exact(model, LONG, DIRECT, **PLAIN)
    check_figures(stats)


def test_no_memory_to_read_with(synthetic, exact):
    # Without memory for staging, experts are paged through the page cache: announced, slow, and right.
    model = synthetic(type="q4_0")
    stats = exact(model, LONG, {**DIRECT, "staging": "1000TiB"}, **PLAIN)
    assert (stats["store"], stats["bytes_read"]) == ("mmap", 0)
    [notice] = notices(stats)
    assert "paged through the page cache" in notice and "no memory for staging" in notice


# ---- ways of reading


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("budget", ["min", "50%"])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("staging", [1, "64MiB", None])
def test_ways_of_reading(synthetic, exact, io, kind, budget, prefetch, staging):
    model = synthetic(type=kind)
    rotary = {"budget": budget, "store": "direct", "prefetch": prefetch, "staging": staging}
    stats = exact(model, LONG, rotary, **PLAIN)
    check_figures(stats, io)
    layer = stats["layers"][0]
    if staging == 1:
        # The minimum: far less than the experts that a prompt wants in a layer.
        assert 0 < stats["staging_bytes"] < layer["n_expert"] * layer["expert_bytes"] // 4
    elif staging == "64MiB":
        assert stats["staging_bytes"] >= 64 << 20
    if prefetch:
        assert stats["prefetch_used"] > 0 and stats["predicted_right"] > 0
        assert 0 < stats["prefetch_accuracy"] <= 1 and 0 < stats["prefetch_coverage"] <= 1
    else:
        assert stats["prefetched"] == stats["prefetch_used"] == stats["predicted"] == 0
        assert stats["prefetch_accuracy"] is None


def test_all_experts_by_threads(synthetic, exact, monkeypatch):
    monkeypatch.setenv("ROTARY_IO", "threads")
    model = synthetic(type="q4_0")
    stats = exact(model, LONG, {"budget": "100%", "store": "direct"}, **PLAIN)
    assert (stats["io"], stats["path"]) == ("threads", "resident")


@pytest.mark.parametrize(("n_prompt", "n_ubatch"), [(1, 128), (40, 1), (LONG, 128)])
def test_batches(synthetic, exact, n_prompt, n_ubatch):
    # With single tokens, experts are predicted; 100 tokens at once want all experts, in 4 slots.
    options = {"n_ubatch": n_ubatch, "n_batch": n_ubatch}
    model = synthetic(type="q4_0")
    stats = exact(model, n_prompt, {**DIRECT, "staging": 1}, **options)
    check_figures(stats)
    assert (stats["waves"] > 0) == (n_ubatch > 1 and n_prompt > 1)


def test_two_threads(synthetic, exact):
    threads = {"n_threads": 2, "n_threads_batch": 2}
    model = synthetic(type="q4_0")
    stats = exact(model, LONG, DIRECT, n_decode=4, **PLAIN, **threads)
    check_figures(stats)


def test_partial_offload(tiny_model, exact):
    # The experts of layers that are not offloaded are not paged; they are resident like other weights.
    rotary = {"budget": "min", "store": "direct"}
    stats = exact(tiny_model, LONG, rotary, n_gpu_layers=3, **PLAIN)
    check_figures(stats)
    assert 0 < stats["n_layers"] < 6
    left = (6 - stats["n_layers"]) * stats["expert_bytes"] // stats["n_layers"]
    assert stats["resident_bytes"] > left


def test_files_that_cannot_be_read_directly(tiny_model, exact):
    # Without mmap, experts are in memory already, which a notice says.
    stats = exact(tiny_model, LONG, DIRECT, use_mmap=False, **PLAIN)
    assert (stats["store"], stats["io"], stats["bytes_read"]) == ("memory", "none", 0)
    assert any("loaded without mmap" in notice for notice in stats["notices"])


def test_auto_keeps_the_mapping_where_the_experts_fit(native, tiny_model):
    _, stats = paged_trace(tiny_model, 12, {"budget": "25%"})
    assert (stats["store"], stats["io"], stats["bytes_read"], stats["notices"]) == ("mmap", "none", 0, [])


# ---- budgets that change


@pytest.mark.parametrize("store", ["mmap", "direct"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_budgets_in_turn(native, synthetic, stock_trace, store, kind):
    model = synthetic(type=kind)
    stock = stock_trace(model, n_prompt=LONG, **PLAIN)
    llama = make(model, {"budget": "min", "store": store}, **PLAIN)
    for budget, n_slots in (("50%", 8), ("25%", 4), ("100%", 16), ("50%", 8), ("min", 4)):
        llama.rotary_set_budget(budget)
        llama.rotary_reset_stats()
        assert_equal(trace(llama, LONG), stock)
        stats = llama.rotary_stats()
        assert (stats["n_slots"], stats["store"]) == (n_slots, store)
        assert stats["slot_bytes"] <= stats["budget_bytes"] == stats["expert_bytes"] * n_slots // 16
        if store == "direct" and n_slots < 16:
            check_figures(stats)
    llama.close()


# ---- several users


def test_contexts_of_one_model(native, tiny_model):
    tokens = list(range(20, 60))

    with_all = make(tiny_model, "100%")
    expected = logits(with_all, tokens)
    with_all.close()
    llama = make(tiny_model, {**DIRECT, "staging": 1})
    context, run = second_context(llama)
    backwards = run(tokens[::-1])
    found = []

    def repeat(function, *args):
        found.extend((function, function(*args)) for _ in range(4))

    # Two threads at once: their lookups, reads and prefetches take turns in one store.
    threads = [
        threading.Thread(target=repeat, args=(logits, llama, tokens)),
        threading.Thread(target=repeat, args=(run, tokens[::-1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    context.close()
    assert np.array_equal(logits(llama, tokens), expected)
    stats = llama.rotary_stats()
    llama.close()
    assert len(found) == 8
    for function, values in found:
        assert np.array_equal(values, expected if function is logits else backwards)
    check_figures(stats)


def test_models_in_turn(native, synthetic, stock_trace, io):
    # Two models, one of them loaded twice: its file is opened once, and each copy has its own mapping.
    models = [synthetic(type="q8_0"), synthetic(type="q4_0"), synthetic(type="q8_0")]
    expected = [stock_trace(model, n_prompt=LONG, **PLAIN) for model in models]
    llamas = [make(model, {**DIRECT, "staging": 1}, **PLAIN) for model in models]
    for _ in range(2):
        for llama, stock in zip(llamas, expected, strict=True):
            assert_equal(trace(llama, LONG), stock)
    llamas[0].close()
    for llama, stock in zip(llamas[1:], expected[1:], strict=True):
        assert_equal(trace(llama, LONG), stock)
        check_figures(llama.rotary_stats(), io)
        llama.close()


def test_models_in_threads(native, synthetic, stock_trace):
    models = [synthetic(type="q8_0"), synthetic(type="q4_0")]
    expected = [stock_trace(model, n_prompt=LONG, **PLAIN) for model in models]
    llamas = [make(model, DIRECT, **PLAIN) for model in models]
    found = {}

    def run(index):
        found[index] = [trace(llamas[index], LONG) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    for index, llama in enumerate(llamas):
        llama.close()
        assert len(found[index]) == 3
        for paged in found[index]:
            assert_equal(paged, expected[index])


def several_traces(model, rotary, n):
    llama = make(model, rotary, **PLAIN)
    traces = [trace(llama, LONG) for _ in range(n)]
    return traces, llama.rotary_stats()


def test_processes_with_one_file(native, synthetic, stock_trace):
    model = synthetic(type="q4_0")
    stock = stock_trace(model, n_prompt=LONG, **PLAIN)
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(Apart(several_traces, model, {"budget": budget, "store": store}, 3))
            for budget, store in (("min", "direct"), ("50%", "direct"), ("min", "mmap"))
        ]
        results = [run.result() for run in runs]
    for traces, stats in results:
        for paged in traces:
            assert_equal(paged, stock)
        if stats["store"] == "direct":
            check_figures(stats)


def test_weights_can_be_read_through_llama_cpp(native, synthetic, stock_trace, tmp_path):
    # llama.cpp can still return an expert's weights, although the mapping is gone.
    model, saved = synthetic(type="q8_0"), tmp_path / "saved.gguf"
    apart(save_model, model, saved)
    paged, _ = paged_trace(saved, LONG, DIRECT, **PLAIN)
    assert_equal(paged, stock_trace(model, n_prompt=LONG, **PLAIN))


def save_model(model, path):
    llama = make(model, DIRECT)
    trace(llama, 12)
    save = llama_api._lib.llama_model_save_to_file
    save.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    save(llama._model.model, os.fsencode(path))


# ---- what is left behind


def cached_share(path):
    """Share of a file's pages that are in the page cache."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), pages)
        del start
    assert failed == 0
    return sum(page & 1 for page in pages) / len(pages)


def run_and_look(model, rotary):
    """Share of the file in the page cache and number of its descriptors, with the model open and closed."""

    def look():
        links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return cached_share(model), sum(os.path.realpath(link) == str(model) for link in links)

    llama = make(model, rotary, **PLAIN)
    trace(llama, LONG)
    during = look()
    llama.close()
    return during, look()


def test_nothing_is_left_in_the_page_cache(native, synthetic, tmp_path):
    model = shutil.copy(synthetic(type="q8_0"), tmp_path)
    with open(model, "rb") as file:
        os.fsync(file.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(model) > 0:
        pytest.skip(f"{tmp_path}: its file system keeps files in memory, as tmpfs does")
    if not reads_directly(model):
        pytest.skip(f"{tmp_path}: its file system refuses direct reads")
    during, after = apart(run_and_look, model, DIRECT)
    assert during[0] < 0.1 and after[0] < 0.1
    assert (during[1], after[1]) == (1, 0), "the file is open as long as it is read"
    during, _ = apart(run_and_look, model, {"budget": "min", "store": "mmap"})
    assert during[0] > 0.5, "the control: a mapping fills the page cache"


# ---- where there is no disk


def test_a_file_that_lies_in_memory_is_mapped(native, synthetic):
    """Reading a tmpfs past the page cache would copy memory to memory, and save none."""
    model = synthetic(type="q8_0", layers=2)
    if file_systems.in_memory(model):
        pytest.skip(f"{model}: lies in memory itself")
    shm = Path("/dev/shm")
    if not shm.is_dir() or file_systems.in_memory(shm) != "tmpfs" or not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm: no tmpfs that can be written")
    no_room = {"budget": "50%", "margin": "1000TiB"}  # so that no model fits
    assert apart(store_of, model, no_room) == "direct"
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        assert apart(store_of, Path(shutil.copy(model, folder)), no_room) == "mmap"


def store_of(model, rotary):
    """The store that a run chose."""
    llama = make(model, rotary)
    llama.eval([1, 2, 3])
    return llama.rotary_stats()["store"]
