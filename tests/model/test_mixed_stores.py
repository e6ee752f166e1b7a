# SPDX-License-Identifier: MIT
"""Experts that are in no file, beside others that are read by direct I/O.

An adapter's experts are always in memory, as are those of a model loaded without mmap. They may be loaded
before the direct store is opened or after; experts in files are still read directly. Logits are stock's.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import llama_cpp
import llama_cpp.llama_cpp as api
import pytest

from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.native import binding as _native
from rotary_llamacpp.runtime import paging
from rotary_llamacpp.runtime.paging import Paging
from tests.support import shards
from tests.support.paged import assert_equal, load_late, make, use_adapter
from tests.support.processes import Apart, apart
from tests.support.tracing import OPTIONS, trace

pytestmark = pytest.mark.model

PROMPT = 60
PLAIN = {"n_ubatch": 32}
ADAPTED = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
KINDS = ("q8_0", "q4_0")  # read in place; repacked where the CPU has a layout for it


def load_adapters(model, path, rotary, options):
    """Traces and statistics without the adapter, with it loaded late, and after it is freed."""
    if os.environ.get("ROTARY_LINK"):
        load_late()
    llama = make(model, rotary, **{**PLAIN, **options})
    found = [(trace(llama, PROMPT), llama.rotary_stats())]
    adapter = api.llama_adapter_lora_init(llama._model.model, os.fsencode(path))
    use_adapter(llama, adapter)
    found.append((trace(llama, PROMPT), llama.rotary_stats()))
    use_adapter(llama, None)
    api.llama_adapter_lora_free(adapter)
    found.append((trace(llama, PROMPT), llama.rotary_stats()))
    llama.close()
    return found


def load_with_adapter(model, path, rotary, options):
    """Trace and statistics of a model whose adapter is loaded before its slots are sized."""
    if os.environ.get("ROTARY_LINK"):
        load_late()
    adapters = []

    class Adapted(Paging):
        def start(self, llama, config):
            adapters.append(api.llama_adapter_lora_init(llama._model.model, os.fsencode(path)))
            super().start(llama, config)

    paging.Paging = Adapted
    llama = make(model, rotary, **{**PLAIN, **options})
    use_adapter(llama, *adapters)
    found = trace(llama, PROMPT), llama.rotary_stats()
    llama.close()
    return found


def check_direct(stats):
    assert stats["store"] == "direct" and stats["bytes_read"] > 0
    assert not any("cannot be read from the file directly" in notice for notice in stats["notices"])


def check_announced(stats):
    [notice] = [each for each in stats["notices"] if "lie in no file" in each]
    assert "lora_a" in notice and "MiB" in notice


@pytest.fixture
def adapted(synthetic, stock_trace, lora_adapter):
    """Make a model, an adapter, and stock's traces without and with the adapter."""

    def make(kind, **stock):
        model = synthetic(type=kind)
        adapter = lora_adapter(model, ADAPTED)
        plain = stock_trace(model, n_prompt=PROMPT, **PLAIN, **stock)
        changed = stock_trace(model, n_prompt=PROMPT, lora_path=str(adapter), **PLAIN, **stock)
        assert not (plain["logits"] == changed["logits"]).all(), "the adapter does something"
        return model, adapter, plain, changed

    return make


@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_after_the_store(native, adapted, kind, budget):
    model, adapter, plain, changed = adapted(kind)
    rotary = {"budget": budget, "store": "direct"}
    before, late, after = apart(load_adapters, model, adapter, rotary, {})
    for (paged, stats), stock in ((before, plain), (late, changed), (after, plain)):
        assert_equal(paged, stock)
        check_direct(stats)
    check_announced(late[1])
    assert before[1]["bytes_read"] < late[1]["bytes_read"] < after[1]["bytes_read"], "still from the file"
    if before[1]["bytes_in_place"] > 0:
        assert late[1]["bytes_in_place"] > before[1]["bytes_in_place"], "still in place"


@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_before_the_store(native, adapted, kind, budget):
    model, adapter, _, changed = adapted(kind)
    paged, stats = apart(load_with_adapter, model, adapter, {"budget": budget, "store": "direct"}, {})
    assert_equal(paged, changed)
    check_direct(stats)
    check_announced(stats)


@pytest.mark.parametrize("budget", ["min", "50%"])
def test_an_adapter_on_a_device(native, late, adapted, budget):
    model, adapter, plain, changed = adapted("q8_0", use_extra_bufts=False)
    rotary = {"budget": budget, "store": "direct", "inner": "LATE0"}
    options = {"n_gpu_layers": -1}
    found = apart(load_adapters, model, adapter, rotary, options, environment=late)
    for (paged, stats), stock in zip(found, (plain, changed, plain), strict=True):
        assert_equal(paged, stock)
        check_direct(stats)
    check_announced(found[1][1])
    paged, stats = apart(load_with_adapter, model, adapter, rotary, options, environment=late)
    assert_equal(paged, changed)
    check_direct(stats)


# ---- several models of a stock program


def stock_models(models):
    """Traces of the open models each time that stock llama_cpp has loaded one on ROTARY0, or closed one."""
    _native.load()
    llamas = []
    found = []
    for path, options in models:
        llamas.append(llama_cpp.Llama(str(path), n_gpu_layers=-1, **{**OPTIONS, **PLAIN, **options}))
        found.append([trace(llama, PROMPT) for llama in llamas])
    while len(llamas) > 1:
        llamas.pop(0).close()
        found.append([trace(llama, PROMPT) for llama in llamas])
    llamas[0].close()
    return found


@pytest.mark.parametrize("budget", ["min", "100%"])
@pytest.mark.parametrize("mapped", [(True, False), (False, True), (True, True)], ids=str)
def test_models_that_share_a_pool(native, synthetic, stock_trace, budget, mapped):
    # The second model's experts are larger than any for which staging was sized.
    paths = [synthetic(type="q8_0"), synthetic(type="q8_0", embd=1024, ff=2048, layers=2, experts=8)]
    first, second = (stock_trace(path, n_prompt=PROMPT, **PLAIN) for path in paths)
    models = [(path, {"use_mmap": its}) for path, its in zip(paths, mapped, strict=True)]
    environment = {"ROTARY_BUDGET": budget, "ROTARY_STORE": "direct", "ROTARY_STAGING": "1MiB"}
    with Apart(stock_models, models, environment=environment) as run:
        found = run.result()
    for paged, stock in zip(found, ([first], [first, second], [second]), strict=True):
        for one, expected in zip(paged, stock, strict=True):
            assert_equal(one, expected)


# ---- weights that leave the mapping


def where_weights_lie(model):
    """Whether each large dense weight between experts is still mapped from the file, by name."""
    header = read_header(model)
    experts = [tensor.offset for tensor in header.tensors if "_exps" in tensor.name]
    path, parts = os.path.realpath(model), []
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, _, offset, _, _, *name = line.split(maxsplit=5)
            begin, end = (int(each, 16) for each in addresses.split("-"))
            if name and name[0].strip() == path:
                parts.append((int(offset, 16), int(offset, 16) + end - begin))
    found = {}
    for tensor in header.tensors:
        if min(experts) < tensor.offset < max(experts) and tensor.n_bytes >= 4 * mmap.PAGESIZE:
            middle = tensor.offset + tensor.n_bytes // 2
            found[tensor.name] = any(begin <= middle < end for begin, end in parts)
    return {name: mapped for name, mapped in found.items() if "_exps" not in name}


def run_stock(models):
    """Traces by stock on Rotary's devices, and where the first model's weights then lie."""
    if os.environ.get("ROTARY_LINK"):
        load_late()
    library = _native.load()
    devices = library.device_list(range(library.device_count()))

    def choose(params):
        params.devices = ctypes.cast(devices, ctypes.c_void_p)

    with paging.default_model_params(choose):
        llamas = [llama_cpp.Llama(str(path), n_gpu_layers=-1, **{**OPTIONS, **PLAIN}) for path in models]
    found = [trace(llama, PROMPT) for llama in llamas]
    return found, where_weights_lie(models[0])


def run_ours(model, rotary):
    """A trace by the package's Llama, and where the model's weights then lie."""
    if os.environ.get("ROTARY_LINK"):
        load_late()
    llama = make(model, rotary, n_gpu_layers=-1, **PLAIN)
    return [trace(llama, PROMPT)], where_weights_lie(model)


@pytest.fixture
def quantised(synthetic, tmp_path):
    """A model of which also the dense weights have a type that CPUs repack."""
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 1
    path = tmp_path / "q4_0.gguf"
    source = os.fsencode(synthetic(type="f16"))
    assert api.llama_model_quantize(source, os.fsencode(path), ctypes.byref(params)) == 0
    return path


def test_repacked_weights_are_not_copied_again(native, quantised, synthetic, stock_trace):
    environment = {"ROTARY_BUDGET": "min", "ROTARY_STORE": "direct"}
    _, ours = apart(run_ours, quantised, {"budget": "min", "store": "direct"})
    if not any(ours.values()):
        pytest.skip("this CPU repacks no weight of the model")
    # Another model's weights, with the same names but not repacked, must make no difference.
    for others in ([], [synthetic(type="f16")]):
        [paged, *_], stock = apart(run_stock, [quantised, *others], environment=environment)
        assert_equal(paged, stock_trace(quantised, n_prompt=PROMPT, **PLAIN))
        assert stock == ours


def test_weights_on_several_devices_are_not_copied(native, late, synthetic, stock_trace):
    model = synthetic(type="q8_0", layers=5)
    stock = stock_trace(model, n_prompt=PROMPT, use_extra_bufts=False, **PLAIN)
    environment = {**late, "LATE_DEVICES": "2", "ROTARY_INNER": "LATE0,LATE1"}
    settings = {"ROTARY_BUDGET": "min", "ROTARY_STORE": "direct"}
    for found, lie in (
        apart(run_stock, [model], environment={**environment, **settings}),
        apart(run_ours, model, {"budget": "min", "store": "direct"}, environment=environment),
    ):
        assert_equal(found[0], stock)
        assert len(lie) > 5 and all(lie.values()), lie


def test_a_shard_with_another_devices_experts_is_not_copied(native, late, synthetic, stock_trace):
    model = synthetic(type="q8_0", layers=6, shards=4)
    stock = stock_trace(model, n_prompt=PROMPT, use_extra_bufts=False, **PLAIN)
    found, n_copied = apart(run_split, model, environment={**late, "LATE_DEVICES": "2"})
    assert_equal(found, stock)
    paths = shards(model)
    tensors = [tensor for path in paths for tensor in read_header(path).tensors]
    dense = sum(tensor.n_bytes for tensor in tensors if "_exps" not in tensor.name)
    edges = sum("_exps" in tensor.name for tensor in tensors) * 2 * mmap.PAGESIZE
    assert 0 < n_copied <= dense + edges + len(paths) * (mmap.PAGESIZE + 16384)


def run_split(model):
    """A trace on all devices, and the bytes copied out of the mappings."""
    load_late()
    llama = make(model, {"budget": "min", "store": "direct"}, n_gpu_layers=-1, **PLAIN)
    return trace(llama, PROMPT), llama.rotary_stats()["resident_bytes"]
