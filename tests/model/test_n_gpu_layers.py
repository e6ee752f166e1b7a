# SPDX-License-Identifier: MIT
"""n_gpu_layers left out means the same for dense and MoE models: all layers where experts are paged.

On LATE0, a GPU for machines without one (late_device.cpp), in processes of their own.
"""

from __future__ import annotations

import numpy as np
import pytest

from rotary_llamacpp import Llama, activate
from rotary_llamacpp.errors import DeviceError
from rotary_llamacpp.native import binding
from tests.support.paged import attempt, load_late
from tests.support.processes import apart
from tests.support.tracing import OPTIONS, trace

pytestmark = pytest.mark.model

ALL = 0x7FFFFFFF


def taken_on_late(library):
    free, total = library.device_memory("LATE0")
    return total - free


def run(model, jobs):
    """For each (rotary, options): layers on GPUs, bytes on LATE0, logits and figures; or the error."""
    load_late()
    library = binding.load()
    empty = taken_on_late(library)

    def one(rotary, options):
        with Llama(str(model), rotary=rotary, **{**OPTIONS, **options}) as llama:
            taken = taken_on_late(library) - empty
            logits = trace(llama, 20)["logits"]
            return llama.model_params.n_gpu_layers, taken, logits, llama.rotary_stats()

    return [attempt(one, *job) for job in jobs]


def test_dense_and_moe_alike(dense_model, tiny_model, stock_trace, late):
    jobs = [
        (rotary, options)
        for rotary in ({"inner": "LATE0"}, {"inner": "LATE0,CPU"}, {"inner": "CPU"})
        for options in ({}, {"n_gpu_layers": -1}, {"n_gpu_layers": 0}, {"n_gpu_layers": 1})
    ]
    for model in (dense_model, tiny_model):
        stock = stock_trace(model, n_prompt=20, use_extra_bufts=True)["logits"]
        plain = stock_trace(model, n_prompt=20, use_extra_bufts=False)["logits"]
        ran = [job for job in jobs if model == dense_model or "," not in job[0]["inner"]]
        found = apart(run, model, ran, environment=late)
        for (rotary, options), (n_layers, taken, logits, stats) in zip(ran, found, strict=True):
            assert n_layers == (1 if options == {"n_gpu_layers": 1} else ALL)
            assert (taken > 0) == ("LATE0" in rotary["inner"]), (model, rotary, options)
            assert np.array_equal(logits, stock) or np.array_equal(logits, plain)
            assert stats.active == (model == tiny_model)


def test_left_out_is_all_layers_where_the_gpus_are_not_named(dense_model, late):
    jobs = [({"budget": "auto"}, {}), ("auto", {}), ("min", {"n_gpu_layers": 0}), (None, {})]
    found = apart(run, dense_model, jobs, environment=late)
    assert [(each[0], each[1] > 0) for each in found] == [(ALL, True), (ALL, True), (0, False), (0, False)]


def test_a_dense_model_too_large_for_the_gpu_runs_on_the_cpu_and_says_so(dense_model, late):
    jobs = [("auto", {}), ("auto", {"n_gpu_layers": -1}), ({"inner": "LATE0"}, {})]
    fell_back, *refused = apart(run, dense_model, jobs, environment={**late, "LATE_MEMORY": "1000"})
    n_layers, taken, _, stats = fell_back
    assert (n_layers, taken) == (0, 0) and stats.reason == "dense model, paging does not apply"
    (notice,) = stats.notices
    assert notice.startswith("dense.gguf: cannot be loaded with all layers on GPUs, Failed to")
    assert notice.endswith("; it runs on the CPU; give n_gpu_layers")
    assert [each[0] for each in refused] == ["ValueError"] * 2, "what was asked for is not changed"


def test_an_inner_device_that_is_not_there(native, dense_model):
    for inner in ("NOSUCH0", "CPU,NOSUCH0", "rpc://127.0.0.1:1"):
        with pytest.raises(DeviceError, match=f"{inner.split(',')[-1]}: no device for a dense model"):
            Llama(str(dense_model), rotary={"inner": inner}, **OPTIONS)


def pickled(model):
    load_late()
    llama = Llama(str(model), **OPTIONS)
    return "n_gpu_layers" in llama.__getstate__(), llama.model_params.n_gpu_layers


def test_pickling_leaves_it_out_again(dense_model, late):
    assert apart(pickled, dense_model, environment=late) == (False, ALL)


def activated(model):
    import llama_cpp

    load_late()
    with activate("25%"):
        llama = llama_cpp.Llama(str(model), **OPTIONS)
    return llama.model_params.n_gpu_layers


def test_activation_means_the_same(dense_model, late):
    assert apart(activated, dense_model, environment=late) == ALL
