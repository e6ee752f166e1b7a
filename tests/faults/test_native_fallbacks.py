# SPDX-License-Identifier: MIT
"""The library's own fallbacks, each announced by a warning and by a notice in the statistics."""

from __future__ import annotations

import ctypes
import io
import logging
import mmap
import resource
from pathlib import Path

import llama_cpp.llama_cpp as api
import pytest

from rotary_llamacpp import Llama
from rotary_llamacpp.native import pools
from tests.support.paged import attempt, logits, make, use_adapter
from tests.support.processes import ONE_ARENA, apart

pytestmark = pytest.mark.model


def run_short_of_memory(model, budget, room_bytes):
    """Run with `room_bytes` of address space left for the slots; returns the statistics and the log."""
    prepare = pools.Pool.prepare

    def prepare_with_little(pool):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room_bytes, hard))
        try:
            prepare(pool)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    pools.Pool.prepare = prepare_with_little
    said = io.StringIO()
    logging.getLogger("rotary_llamacpp").addHandler(logging.StreamHandler(said))
    llama = make(model, {"budget": budget})
    llama.eval([1, 2, 3])
    return llama.rotary_stats(), said.getvalue()


@pytest.fixture(scope="module")
def repacked_model(synthetic):
    """A model with about 200 MiB of experts, which get slots even if all fit, since the CPU repacks them."""
    return synthetic(type="q4_0", embd=1024, ff=1024, layers=8, experts=16)


def run_beside_reserved_addresses(model):
    """Whether a model is paged where 16 TiB of addresses are reserved; None if the system refuses that."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    if libc.mmap(None, 1 << 44, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) in (None, 2**64 - 1):
        return None
    return make(model, "auto").rotary_stats()["active"]


def test_reserved_addresses_are_no_promise(native, tiny_model):
    # Sanitizers, garbage collectors and JITs reserve terabytes that they never use.
    active = apart(run_beside_reserved_addresses, tiny_model)
    if active is None:
        pytest.skip("no address space can be reserved here")
    assert active is True


def test_auto_budget_shrinks_and_says_so(native, repacked_model):
    stats, log = apart(run_short_of_memory, repacked_model, "auto", 96 << 20, environment=ONE_ARENA)
    assert stats["active"] and 0 < stats["slot_bytes"] <= stats["budget_bytes"] < stats["expert_bytes"]
    assert any("auto budget lowered to" in notice for notice in stats["notices"])
    assert "auto budget lowered to" in log


def test_a_stated_budget_is_not_lowered(native, repacked_model):
    arguments = (run_short_of_memory, repacked_model, "90%", 96 << 20)
    kind, text = apart(attempt, *arguments, environment=ONE_ARENA)
    assert kind == "LibraryError"
    assert "no memory for" in text and "lower the budget" in text


def test_an_adapter_loaded_after_sizing_is_announced(native, tiny_model, lora_adapter, caplog):
    adapter = lora_adapter(tiny_model, ("ffn_up_exps.weight", "ffn_down_exps.weight"))

    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False}
    stock = Llama(str(tiny_model), rotary=None, lora_path=str(adapter), **options)
    tokens = [5, 6, 7]
    expected = logits(stock, tokens)
    stock.close()

    llama = Llama(str(tiny_model), rotary="min", **options)
    without = logits(llama, tokens)
    late = api.llama_adapter_lora_init(llama._model.model, str(adapter).encode())
    use_adapter(llama, late)
    assert (logits(llama, tokens) == expected).all() and not (without == expected).all()
    with caplog.at_level(logging.WARNING, "rotary_llamacpp"):
        assert any(
            "was loaded after the slots were sized" in each for each in llama.rotary_stats()["notices"]
        )
    assert "was loaded after the slots were sized" in caplog.text
    use_adapter(llama, None)
    api.llama_adapter_lora_free(late)
    assert (logits(llama, tokens) == without).all()
    llama.close()
