# SPDX-License-Identifier: MIT
"""activate() pages plain llama_cpp.Llama objects, and deactivate() restores llama_cpp completely."""

from __future__ import annotations

import inspect
import pickle
import threading

import llama_cpp
import pytest
from llama_cpp import Llama as ImportedBefore

import rotary_llamacpp
from rotary_llamacpp import activate, deactivate
from rotary_llamacpp.errors import BudgetError, DeviceError
from tests.support.tracing import OPTIONS


def class_contents():
    """The attributes of llama_cpp.Llama, without the flag that stock itself sets."""
    return {name: value for name, value in vars(llama_cpp.Llama).items() if "initialized" not in name}


STOCK = class_contents()


@pytest.fixture(autouse=True)
def stock_afterwards():
    yield
    deactivate()
    assert class_contents() == STOCK, "the class is as it was"


def test_plain_objects_are_paged(native, tiny_model):
    activate("25%")
    for kind in (ImportedBefore, llama_cpp.Llama, llama_cpp.llama.Llama):
        llama = kind(str(tiny_model), **OPTIONS)
        assert type(llama) is llama_cpp.Llama
        llama.create_completion("In the beginning", max_tokens=4)
        stats = llama.rotary_stats()
        assert stats["active"] and stats["n_slots"] == 8 and stats["requests"] > 0
        llama.close()
        assert llama._rotary.pools is None and llama.rotary_stats() == stats


def test_each_constructor_may_choose(native, tiny_model):
    activate("25%")
    paged, off = (
        ImportedBefore(str(tiny_model), rotary="min", **OPTIONS),
        ImportedBefore(str(tiny_model), rotary=None),
    )
    assert paged.rotary_stats()["n_slots"] == 4
    assert not off.rotary_stats()["active"]


def test_the_subclass_decides_for_itself(native, tiny_model):
    activate("25%")
    llama = rotary_llamacpp.Llama(str(tiny_model), rotary="min", **OPTIONS)
    assert llama.rotary_stats()["n_slots"] == 4
    assert llama.__getstate__()["rotary"] == "min"
    off = rotary_llamacpp.Llama(str(tiny_model), rotary=None, **OPTIONS)
    assert not off.rotary_stats()["active"]


def test_idempotent_and_the_last_default_counts(native, tiny_model):
    activate("25%")
    init = llama_cpp.Llama.__init__
    activate("min")
    assert llama_cpp.Llama.__init__ is init
    assert ImportedBefore(str(tiny_model), **OPTIONS).rotary_stats()["n_slots"] == 4
    deactivate()
    deactivate()


def test_nonsense_is_refused_at_once():
    with pytest.raises(BudgetError):
        activate("lots")
    assert class_contents() == STOCK


def test_signature_and_pickling(native, tiny_model):
    stock = list(inspect.signature(ImportedBefore).parameters)
    activate("25%")
    assert [name for name in inspect.signature(ImportedBefore).parameters if name != "rotary"] == stock
    llama = ImportedBefore(str(tiny_model), **OPTIONS)
    again = pickle.loads(pickle.dumps(llama))
    assert again.rotary_stats()["n_slots"] == 8


def test_objects_outlive_deactivation_and_older_ones_are_left_alone(native, tiny_model):
    older = ImportedBefore(str(tiny_model), **OPTIONS)
    activate("25%")
    assert older.rotary_stats()["reason"] == "made before activate()"
    assert "rotary" not in older.__getstate__()
    llama = ImportedBefore(str(tiny_model), **OPTIONS)
    deactivate()
    llama.create_completion("In the beginning", max_tokens=4)
    pool = llama._rotary.pools
    assert pool.stats()["requests"] > 0
    llama.close()
    assert llama._rotary.pools is None
    plain = ImportedBefore(str(tiny_model), **OPTIONS)
    assert not hasattr(plain, "rotary_stats")


def test_plain_objects_have_what_ours_have(native, tiny_model, monkeypatch):
    activate("25%")
    llama = ImportedBefore(str(tiny_model), **OPTIONS)
    llama.rotary_set_budget("50%")
    assert llama.rotary_stats()["n_slots"] == 16

    def decode(*_):
        native.c.rotary_device_set_inner(0, b"NOSUCH0")
        return -3

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_decode", decode)
    with pytest.raises(DeviceError, match="NOSUCH0"):
        llama.create_completion("In the beginning", max_tokens=4)


# ---- as a context manager


def paged_slots(model):
    """Slots of a layer of a model that is loaded now; None for stock's class."""
    llama = ImportedBefore(str(model), **OPTIONS)
    try:
        return llama.rotary_stats().n_slots if hasattr(llama, "rotary_stats") else None
    finally:
        llama.close()


def test_a_block_deactivates_at_its_end(native, tiny_model):
    with activate("25%"):
        assert paged_slots(tiny_model) == 8
    assert class_contents() == STOCK and paged_slots(tiny_model) is None


def test_a_block_deactivates_after_an_exception_and_passes_it_on(native):
    with pytest.raises(ZeroDivisionError), activate("25%"):
        assert class_contents() != STOCK
        raise ZeroDivisionError
    assert class_contents() == STOCK


def test_what_was_before_a_block_holds_again(native, tiny_model):
    activate("min")
    with activate("25%"):
        with activate("50%"):
            assert paged_slots(tiny_model) == 16
        assert paged_slots(tiny_model) == 8
    assert paged_slots(tiny_model) == 4, "the plain call before"
    with activate("25%"):
        deactivate()
        assert paged_slots(tiny_model) is None
    assert paged_slots(tiny_model) == 4


def test_an_activation_may_have_several_blocks(native, tiny_model):
    activation = activate("25%")
    assert paged_slots(tiny_model) == 8, "it holds from the call on"
    for _ in range(2):
        with activation:
            assert paged_slots(tiny_model) == 8
        assert class_contents() == STOCK


def test_a_model_of_a_block_outlives_it(native, tiny_model):
    with activate("25%"):
        llama = ImportedBefore(str(tiny_model), **OPTIONS)
    llama.create_completion("In the beginning", max_tokens=4)
    assert llama._rotary.pools.stats()["requests"] > 0
    llama.close()


def test_from_many_threads():
    threads = [threading.Thread(target=lambda: (activate(), deactivate(), activate())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hasattr(llama_cpp.Llama, "rotary_stats")
