# SPDX-License-Identifier: MIT
"""Llama as a drop-in: stock's arguments, paging off, fallbacks, pickling, closing, several models at once."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import pickle
import sys
import threading

import llama_cpp
import llama_cpp.llama_cpp as llama_api
import numpy as np
import pytest

from rotary_llamacpp import Llama, RotaryConfig
from rotary_llamacpp.errors import BudgetError, DeviceError, LibraryError, ModelError, RotaryError
from rotary_llamacpp.native import binding as _native
from rotary_llamacpp.native import pools as native_pools
from rotary_llamacpp.runtime import paging
from rotary_llamacpp.runtime.stats import NOT_PAGED
from tests.support.processes import python
from tests.support.tracing import OPTIONS, trace

PROMPT = "In the beginning"


@pytest.fixture
def make(native, tiny_model):
    """Make models, which are closed at the end."""
    made = []

    def make_one(rotary="min", model=tiny_model, **kwargs):
        made.append(Llama(str(model), rotary=rotary, **{**OPTIONS, **kwargs}))
        return made[-1]

    yield make_one
    for llama in made:
        llama.close()


def greedy(llama, n=12):
    return llama.create_completion(PROMPT, max_tokens=n, temperature=0)["choices"][0]["text"]


def test_signature_is_stocks_plus_one():
    stock, ours = (dict(inspect.signature(kind).parameters) for kind in (llama_cpp.Llama, Llama))
    assert ours.pop("rotary").default == "auto"
    assert list(ours) == list(stock)
    assert ours == stock


def test_unknown_arguments_pass_through_as_in_stock(make):
    assert make(some_future_argument=1).rotary_stats()["active"]


def test_stats(make):
    llama = make({"budget": "25%", "store": "mmap"})
    fresh = llama.rotary_stats()
    assert fresh["hit_rate"] is None and fresh["requests"] == 0
    greedy(llama)
    stats = json.loads(json.dumps(llama.rotary_stats()))
    assert set(stats) >= {
        "active", "reason", "inner_device", "budget_bytes", "slot_bytes", "n_slots", "n_expert", "n_layers",
        "path", "hit_rate", "hits", "misses", "requests", "bypassed", "evictions", "bytes_paged", "waves",
        "waits", "wait_us", "page_us", "staging_bytes", "notices", "layers",
    }  # fmt: skip
    assert set(stats) == {*NOT_PAGED, "layers", "notices"}, "the same keys, paged or not"
    assert (stats["store"], stats["io"], stats["read_bandwidth"]) == ("mmap", "none", None)
    assert stats["prefetch_accuracy"] is stats["prefetch_timeliness"] is None
    assert stats["prefetch_coverage"] == 0.0, "there were misses"
    assert (stats["active"], stats["inner_device"], stats["path"]) == (True, "CPU", "slots")
    assert (stats["n_layers"], stats["n_expert"], stats["n_slots"]) == (6, 32, 8)
    assert stats["budget_bytes"] == stats["expert_bytes"] // 4 >= stats["slot_bytes"] > 0
    assert stats["hit_rate"] == stats["hits"] / stats["requests"]
    for name in ("requests", "hits", "misses", "evictions", "bytes_paged"):
        assert stats[name] == sum(layer[name] for layer in stats["layers"]) > 0, name
    assert [layer["il"] for layer in stats["layers"]] == list(range(6))
    assert all(layer["n_resident"] <= 8 for layer in stats["layers"])


def test_stats_of_direct_reads(make):
    mapped, direct = (make({"budget": "25%", "store": store}) for store in ("mmap", "direct"))
    assert greedy(direct) == greedy(mapped)
    stats = direct.rotary_stats()
    assert stats["store"] == "direct" and stats["io"] in ("uring", "threads")
    assert stats["bytes_read"] >= stats["bytes_paged"] > 0 and stats["reads"] > 0
    assert stats["read_bandwidth"] == 1e6 * stats["bytes_read"] / stats["read_us"]
    for rate in ("prefetch_accuracy", "prefetch_coverage", "prefetch_timeliness"):
        assert stats[rate] is None or 0 <= stats[rate] <= 1, rate
    quiet = make({"budget": "25%", "store": "direct", "prefetch": False, "staging": "4MiB"})
    assert greedy(quiet) == greedy(mapped)
    assert quiet.rotary_stats()["prefetched"] == 0
    assert quiet.rotary_stats()["prefetch_accuracy"] is None


def test_rates():
    figures = {
        **NOT_PAGED, "hits": 3, "requests": 4, "misses": 20, "prefetched": 8, "prefetch_used": 4,
        "late_hits": 1, "bytes_read": 5000, "read_us": 1000,
    }  # fmt: skip
    assert paging._rates(figures) == {
        "hit_rate": 0.75, "read_bandwidth": 5e6,
        "prefetch_accuracy": 0.5, "prefetch_coverage": 0.2, "prefetch_timeliness": 0.75,
    }  # fmt: skip
    assert set(paging._rates(NOT_PAGED).values()) == {None}


@pytest.mark.parametrize("store", ["mmap", "direct"])
def test_set_budget(make, store):
    llama = make({"budget": "min", "store": store})
    expected = greedy(llama)
    for budget, n_slots in (("50%", 16), ("100%", 32), ("8 slots", 8), (0.25, 8)):
        llama.rotary_set_budget(budget)
        stats = llama.rotary_stats()
        assert stats["n_slots"] == n_slots
        assert n_slots == 32 or not any(layer["n_resident"] for layer in stats["layers"]), "starts cold"
        llama.reset()
        assert greedy(llama) == expected
    for budget, reason in (
        ("1%", 'use "min", "4 slots" or 3MiB'),
        ("lots", "not understood"),
        (0, "budget 0"),
    ):
        with pytest.raises(BudgetError, match=reason):
            llama.rotary_set_budget(budget)
    assert llama.rotary_stats()["n_slots"] == 8
    llama.close()
    with pytest.raises(RotaryError, match="the model is closed"):
        llama.rotary_set_budget("50%")


def test_set_budget_of_what_is_not_paged(make):
    with pytest.raises(RotaryError, match="budget '50%': cannot be set, rotary is off; "):
        make(None).rotary_set_budget("50%")


def test_a_failing_graph_raises_what_the_library_says(make, native, monkeypatch):
    llama = make()
    stock_decode = llama_api.llama_decode
    failing = True

    def decode(*args):
        if not failing:
            return stock_decode(*args)
        native.c.rotary_device_set_inner(0, b"NOSUCH0")  # sets an error, as a failing graph does
        return -3

    monkeypatch.setattr(llama_api, "llama_decode", decode)
    with pytest.raises(DeviceError, match="NOSUCH0") as caught:
        llama.eval([1, 2, 3])
    assert caught.value.__suppress_context__
    failing = False
    llama.eval([1, 2, 3])
    monkeypatch.setattr(llama_api, "llama_decode", lambda *_: 1)
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):  # the old error is not repeated
        llama.eval([1, 2, 3])


def test_reset(make):
    llama = make()
    greedy(llama)
    before = llama.rotary_stats()
    llama.rotary_reset_stats()
    after = llama.rotary_stats()
    assert before["requests"] > 0 == after["requests"] and after["hit_rate"] is None
    assert after["n_slots"] == before["n_slots"] and after["budget_bytes"] == before["budget_bytes"]


def test_close_frees_at_once_keeps_the_figures_and_is_idempotent(make):
    llama = make()
    greedy(llama)
    before = llama.rotary_stats()
    llama.close()
    assert llama.rotary_stats() == before
    assert llama._rotary.pools is None
    llama.close()
    llama.rotary_reset_stats()
    assert llama.rotary_stats() == before


def test_figures_may_be_read_while_another_thread_closes(make):
    llama = make()
    greedy(llama)
    expected = llama.rotary_stats()
    seen = []
    reader = threading.Thread(target=lambda: seen.extend(llama.rotary_stats() for _ in range(200)))
    reader.start()
    llama.close()
    reader.join()
    assert len(seen) == 200 and all(stats == expected for stats in seen)


def test_dropping_the_object_closes_the_pool(native, tiny_model):
    llama = Llama(str(tiny_model), rotary="min", **OPTIONS)
    kept = llama._rotary
    assert kept.pools is not None
    del llama
    gc.collect()
    assert kept.pools is None


@pytest.mark.parametrize("off", [None, False, 0, "0", {"budget": 0}])
def test_off_is_off(tiny_model, off, monkeypatch):
    monkeypatch.setattr(_native, "load", lambda: pytest.fail("the native library was loaded"))
    monkeypatch.setattr(_native, "_loaded", None)
    seen = {}
    stock_init = llama_cpp.Llama.__init__

    def spy(self, model_path, **kwargs):
        seen.update(kwargs)
        stock_init(self, model_path, **kwargs)

    monkeypatch.setattr(llama_cpp.Llama, "__init__", spy)
    llama = Llama(str(tiny_model), rotary=off, **OPTIONS)
    assert seen == OPTIONS
    assert llama.model_params.devices is None
    assert llama.rotary_stats()["reason"] == "rotary is off"
    llama.close()


def test_dense_model_runs_and_says_so(make, dense_model, caplog):
    with caplog.at_level(logging.DEBUG, "rotary_llamacpp"):
        llama = make("auto", dense_model)
    assert "paging does not apply" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.INFO], "verbose is off"
    assert llama.rotary_stats()["reason"] == "dense model, paging does not apply"
    assert llama.create_completion("a", max_tokens=4)["usage"]["completion_tokens"] > 0


def test_announces_what_it_chose(make, caplog):
    with caplog.at_level(logging.INFO, "rotary_llamacpp"):
        make({"budget": "25%", "store": "mmap", "verbose": True})
        make({"budget": "25%", "verbose": True}, use_mmap=False)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for part in ("tiny-moe-q8_0.gguf", "on CPU", "4.8 MiB of 19.1 MiB", "8 of 32 slots per layer"):
        assert part in lines[0]
    assert "store mmap" in lines[0] and "store memory" in lines[1]


def said_by(*lines):
    """Run a program of these lines; returns its stderr."""
    code = "\n".join(["from rotary_llamacpp import *", *lines])
    ran = python(code)
    assert ran.stdout == ""
    return ran.stderr


def test_says_it_on_stderr_when_logging_is_not_configured(tiny_model, native):
    said = said_by(f"Llama({str(tiny_model)!r}, rotary={{'budget': 'min', 'verbose': True}}, verbose=False)")
    assert said.count("\n") == 1 and "slots per layer" in said


@pytest.mark.parametrize("logging", ["", "import logging; logging.basicConfig()"])
def test_verbose_false_says_nothing(tiny_model, dense_model, native, logging):
    model = str(tiny_model)
    said = said_by(
        logging,
        f"llama = Llama({model!r}, rotary='auto', verbose=False)",
        "llama.create_completion('abc', max_tokens=2)",
        "llama.rotary_stats()",
        f"Llama({model!r}, rotary={{'budget': '25%', 'store': 'direct'}}, verbose=False).close()",
        f"Llama({str(dense_model)!r}, verbose=False)",
        f"Llama({model!r}, rotary=None, verbose=False)",
        "activate('min'); import llama_cpp",
        f"llama_cpp.Llama({model!r}, verbose=False)",
    )
    assert said == ""


def test_verbose_says_what_was_chosen(tiny_model, native):
    said = said_by(f"Llama({str(tiny_model)!r}, rotary='min')")
    assert "slots per layer" in said, "as llama.cpp's own log, unasked"
    said = said_by(f"Llama({str(tiny_model)!r}, rotary={{'budget': 'min', 'verbose': False}})")
    assert "slots per layer" not in said


def test_verbose_false_leaves_warnings(tiny_model, native):
    said = said_by(
        f"llama = Llama({str(tiny_model)!r}, rotary='min', verbose=False, use_mlock=True)",
        "assert llama.rotary_stats()['notices']",
    )
    assert said.count("\n") == 1 and "use_mlock" in said


def test_notices_are_warned_of_once_and_kept(make, caplog, monkeypatch):
    llama = make()
    monkeypatch.setattr(llama._rotary.pools, "notices", lambda: ["x: something fell back"])
    with caplog.at_level(logging.WARNING, "rotary_llamacpp"):
        for _ in range(2):
            assert "x: something fell back" in llama.rotary_stats()["notices"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["x: something fell back"]


def test_mlock_defeats_paging_and_is_warned_of(make, caplog):
    llama = make(use_mlock=True)
    assert "use_mlock" in caplog.text and "use_mlock" in llama.rotary_stats()["notices"][0]


@pytest.mark.parametrize("names", [("attn_q.weight",), ("ffn_up_exps.weight", "ffn_down_exps.weight")])
def test_lora_adapters(make, tiny_model, lora_adapter, names):
    adapter = lora_adapter(tiny_model, names)
    plain, stock, paged = (
        trace(make(rotary, lora_path=lora), 40)["logits"]
        for rotary, lora in ((None, None), (None, str(adapter)), ("min", str(adapter)))
    )
    assert not np.array_equal(plain, stock), "the adapter does something"
    assert np.array_equal(paged, stock)


def test_saved_states(make):
    paged, stock = make("min"), make(None)
    for llama in (paged, stock):
        llama.eval(list(range(10, 40)))
        state = llama.save_state()
        llama.reset()
        llama.eval([5, 6])
        llama.load_state(state)
        llama.eval([77])
    assert np.array_equal(paged.scores[:31], stock.scores[:31])


def test_plain_llama_beside_a_paged_one(native, tiny_model, stock_trace):
    # The library is loaded in this process, so that llama.cpp sees its device; the output must not change.
    for n_gpu_layers in (0, -1):
        plain = llama_cpp.Llama(str(tiny_model), n_gpu_layers=n_gpu_layers, **OPTIONS)
        assert np.array_equal(trace(plain, 20)["logits"], stock_trace(tiny_model, n_prompt=20)["logits"])
        plain.close()


def test_auto_falls_back_with_a_warning(tiny_model, monkeypatch, caplog):
    def missing():
        raise LibraryError("libggml-rotary.so: not there")

    monkeypatch.setattr(_native, "load", missing)
    with caplog.at_level(logging.WARNING, "rotary_llamacpp"):
        llama = Llama(str(tiny_model), **OPTIONS)
    assert "libggml-rotary.so: not there" in caplog.text
    stats = llama.rotary_stats()
    assert stats["active"] is False and "not there" in stats["reason"]
    assert greedy(llama)
    llama.close()
    with pytest.raises(LibraryError, match="not there"):
        Llama(str(tiny_model), rotary="25%", **OPTIONS)
    with pytest.raises(LibraryError, match="not there"):
        Llama(str(tiny_model), rotary=RotaryConfig(), **OPTIONS)


@pytest.mark.parametrize("where", [(native_pools.Pool, "prepare"), (_native.Library, "devices_for")])
def test_auto_falls_back_when_there_is_no_room_or_no_device(native, tiny_model, where, monkeypatch, caplog):
    def refuse(*_):
        raise BudgetError("tiny-moe: no room left; 0 MiB; free some")

    monkeypatch.setattr(*where, refuse)
    llama = Llama(str(tiny_model), **OPTIONS)
    stats = llama.rotary_stats()
    assert "no room left" in caplog.text and "no room left" in stats["reason"] and not stats["active"]
    assert llama._rotary.pools is None
    assert greedy(llama)
    llama.close()
    with pytest.raises(BudgetError, match="no room left"):
        Llama(str(tiny_model), rotary={"budget": "auto"}, **OPTIONS)


@pytest.mark.parametrize(
    ("rotary", "kind", "reason"),
    [
        ("1%", BudgetError, 'take 2.4 MiB .* use "min", "4 slots" or 3MiB'),
        ("nonsense", BudgetError, "not understood"),
        ({"bugdet": 1}, RotaryError, "unknown option"),
        ({"inner": "FOO0"}, DeviceError, "FOO0"),
    ],
)
def test_refusals_leave_nothing_behind(native, tiny_model, rotary, kind, reason, monkeypatch, recwarn):
    monkeypatch.setattr(
        llama_api, "llama_model_load_from_file", lambda *_: pytest.fail("the model was loaded")
    )
    hook = llama_api.llama_model_default_params
    with pytest.raises(kind, match=reason):
        Llama(str(tiny_model), rotary=rotary, **OPTIONS)
    gc.collect()
    assert llama_api.llama_model_default_params is hook
    assert not [w for w in recwarn if "_stack" in str(w.message)], "stock's __del__ works on what was refused"


def stricter(monkeypatch, path):
    """Set a limit of the package's reader, not of stock's, that this model exceeds."""
    monkeypatch.setattr("rotary_llamacpp.gguf_files.header._MAX_TENSORS", 3)
    return path


def test_auto_falls_back_where_our_reader_is_stricter(native, tiny_model, stock_trace, monkeypatch, caplog):
    model = stricter(monkeypatch, tiny_model)
    with pytest.raises(ModelError, match="items announced"):
        Llama(str(model), rotary="25%", **OPTIONS)
    with pytest.raises(ModelError, match="items announced"):
        Llama(str(model), rotary={"budget": "auto"}, **OPTIONS)
    caplog.clear()
    llama = Llama(str(model), **OPTIONS)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "runs without paging" in warned[0] and "items announced" in warned[0]
    stats = llama.rotary_stats()
    assert not stats["active"] and "items announced" in stats["reason"] and stats["notices"] == warned
    assert np.array_equal(trace(llama, 20)["logits"], stock_trace(tiny_model, n_prompt=20)["logits"])
    llama.close()


def test_a_model_that_neither_reads_raises_our_reason(native, tmp_path, tiny_model, caplog):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_model.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="truncated"):
        Llama(str(damaged), **OPTIONS)
    assert "runs without paging" not in caplog.text


def test_missing_model_raises_what_stock_raises(native):
    with pytest.raises(ValueError, match="no such file"):
        Llama("/no/such.gguf")
    with pytest.raises(ModelError):
        Llama("/no/such.gguf", rotary="25%")


def test_stock_failing_later_closes_the_pool(native, tiny_model, monkeypatch):
    pools = []

    class Pool(native_pools.Pool):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pools.append(self)

    monkeypatch.setattr(native_pools, "Pool", Pool)
    monkeypatch.setattr(llama_api, "llama_init_from_model", lambda *_: None)
    with pytest.raises(ValueError, match="context"):
        Llama(str(tiny_model), rotary="min", **OPTIONS)
    assert [pool._pool for pool in pools] == [None]


@pytest.mark.parametrize("given", [{}, {"n_gpu_layers": 0}, {"n_gpu_layers": -1}, {"n_gpu_layers": 3}])
def test_n_gpu_layers(make, given):
    llama = make("min", **given)
    assert llama.model_params.n_gpu_layers == (3 if given.get("n_gpu_layers") == 3 else 0x7FFFFFFF)
    assert llama.rotary_stats()["inner_device"] == "CPU"


@pytest.mark.parametrize("given", [{}, {"n_gpu_layers": 0}, {"n_gpu_layers": 3}])
def test_pickling_runs_the_constructor_again(make, given):
    llama = make({"budget": "25%", "repack": False}, **given)
    state = llama.__getstate__()
    assert state["rotary"] == {"budget": "25%", "repack": False}
    assert ("n_gpu_layers" in state) == bool(given)
    again = pickle.loads(pickle.dumps(llama))
    assert again.rotary_stats()["n_slots"] == 8
    assert again.model_params.n_gpu_layers == llama.model_params.n_gpu_layers
    assert greedy(again) == greedy(llama)
    again.close()


def test_vocab_only_loads_nothing_to_page(make):
    llama = make("min", vocab_only=True)
    stats = llama.rotary_stats()
    assert not stats["active"] and stats["reason"] == "vocab_only loads no weights"
    assert llama.tokenize(PROMPT.encode()) == make(None).tokenize(PROMPT.encode())


def test_two_models_at_once(make, synthetic, stock_trace, tiny_model):
    other = synthetic(type="q8_0")
    first, second = make("25%"), make("min", other)
    assert first.rotary_stats()["n_layers"] == 6 and second.rotary_stats()["n_layers"] == 4
    for llama, model in ((first, tiny_model), (second, other), (first, tiny_model)):
        assert np.array_equal(trace(llama, 20)["logits"], stock_trace(model, n_prompt=20)["logits"])
    first.close()
    assert np.array_equal(trace(second, 20)["logits"], stock_trace(other, n_prompt=20)["logits"])


def test_two_threads_with_a_model_each(native, tiny_model, synthetic, stock_trace):
    models = (tiny_model, synthetic(type="q8_0"))
    expected = [stock_trace(model, n_prompt=20)["logits"] for model in models]
    found: list[list[bool]] = [[], []]

    def work(i):
        for _ in range(3):
            llama = Llama(str(models[i]), rotary="min", **OPTIONS)
            found[i].append(np.array_equal(trace(llama, 20)["logits"], expected[i]))
            llama.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 3] * 2


def test_the_hook_reaches_only_its_own_thread(native):
    elsewhere = []
    with paging.default_model_params(lambda params: setattr(params, "main_gpu", 77)):
        thread = threading.Thread(
            target=lambda: elsewhere.append(llama_api.llama_model_default_params().main_gpu)
        )
        thread.start()
        thread.join()
        assert llama_api.llama_model_default_params().main_gpu == 77
    assert elsewhere == [0] and llama_api.llama_model_default_params().main_gpu == 0


def test_importing_the_package_loads_nothing(native):
    code = "import sys, rotary_llamacpp; sys.exit('llama_cpp' in sys.modules or 'cffi' in sys.modules)"
    python(code)


def test_embeddings_and_chat_pass_through(make):
    assert len(make(embedding=True).embed("In the beginning")) > 0
    answer = make().create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=4)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_nothing_native_is_asked_while_the_interpreter_ends(make, monkeypatch):
    llama = make()
    pool = llama._rotary.pools
    with monkeypatch.context() as patch:
        patch.setattr(sys, "is_finalizing", lambda: True)
        patch.setattr(native_pools.Pool, "stats", lambda self: pytest.fail("cffi may be gone"))
        patch.setattr(native_pools.Pool, "close", lambda self: pytest.fail("cffi may be gone"))
        llama.close()
    pool.close()


# ---- as a context manager


def test_a_block_closes_at_its_end(native, tiny_model):
    with Llama(str(tiny_model), rotary="min", **OPTIONS) as llama:
        assert type(llama) is Llama and llama._rotary.pools is not None
        greedy(llama, 2)
    assert llama._rotary.pools is None and llama._model.model is None
    assert llama.rotary_stats().requests > 0, "the last figures stay"
    with llama:
        pass  # a closed model may be closed again


def test_a_block_closes_after_an_exception_and_passes_it_on(native, tiny_model):
    class MineError(Exception):
        pass

    with pytest.raises(MineError), Llama(str(tiny_model), rotary="min", **OPTIONS) as llama:
        raise MineError
    assert llama._rotary.pools is None and llama._model.model is None


def test_a_subclass_keeps_its_type(native, tiny_model):
    class Mine(Llama):
        pass

    with Mine(str(tiny_model), rotary="min", **OPTIONS) as llama:
        assert type(llama) is Mine
