# SPDX-License-Identifier: MIT
"""Paging changes no bit: all logits and the greedy tokens equal stock's, with the same kernels on both sides.

Stock runs in a process of its own. Prompts are shorter and longer than n_ubatch; budgets go from one token's
experts to all of them.
"""

from __future__ import annotations

import pytest

from tests.support.paged import assert_equal, paged_trace

BUDGETS = ("min", "25%", "50%", "100%")
SHORT, LONG = 12, 100


@pytest.mark.parametrize("n_prompt", [SHORT, LONG])
@pytest.mark.parametrize("budget", BUDGETS)
def test_tiny_model(native, tiny_model, stock_trace, budget, n_prompt):
    stock = stock_trace(tiny_model, n_prompt=n_prompt, n_ubatch=32)
    paged, stats = paged_trace(tiny_model, n_prompt, budget, n_ubatch=32)
    assert_equal(paged, stock)
    assert stats["active"]
    if budget == "min":
        assert stats["n_slots"] == 4
        assert stats["evictions"] > 0 and stats["misses"] > 0, "the smallest budget really pages"


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q8_0", "q6_k", "f16"])
@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
@pytest.mark.parametrize("repack", [True, False])
def test_quantisations(native, synthetic, stock_trace, kind, budget, repack):
    model = synthetic(type=kind)
    stock = stock_trace(model, n_prompt=LONG, n_ubatch=32, use_extra_bufts=repack)
    paged, _ = paged_trace(model, LONG, {"budget": budget, "repack": repack}, n_ubatch=32)
    assert_equal(paged, stock)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("repack", [True, False])
def test_batches_beyond_the_slots(native, synthetic, stock_trace, direct, repack):
    # 100 tokens in one ubatch want all 16 experts; there are 4 slots. Directly from the mapping, or in waves.
    model = synthetic(type="q4_0")
    stock = stock_trace(model, n_prompt=LONG, n_ubatch=128, use_extra_bufts=repack)
    rotary = {"budget": "min", "direct": direct, "repack": repack}
    paged, stats = paged_trace(model, LONG, rotary, n_ubatch=128)
    assert_equal(paged, stock)
    if not direct:
        assert stats["waves"] > 0 and stats["bypassed"] == 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("test-llama", {"type": "q8_0"}),
        ("test-gpt-oss", {"type": "q8_0"}),  # expert biases
        ("test-shared", {"type": "q4_0", "fused": True}),  # gate and up in one tensor, and a shared expert
        ("test", {"type": "q4_k_m"}),  # layers of unlike sizes
        ("test", {"type": "q8_0", "shards": 3}),
    ],
)
@pytest.mark.parametrize("budget", ["min", "50%"])
def test_architectures_and_files(native, synthetic, stock_trace, shape, options, budget):
    model = synthetic(shape, **options)
    stock = stock_trace(model, n_prompt=LONG, n_ubatch=32)
    paged, _ = paged_trace(model, LONG, budget, n_ubatch=32)
    assert_equal(paged, stock)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_without_mmap(native, synthetic, stock_trace, kind):
    model = synthetic(type=kind)
    stock = stock_trace(model, n_prompt=LONG, n_ubatch=32, use_mmap=False)
    paged, _ = paged_trace(model, LONG, "min", n_ubatch=32, use_mmap=False)
    assert_equal(paged, stock)


def test_partial_offload(native, tiny_model, stock_trace):
    stock = stock_trace(tiny_model, n_prompt=LONG, n_ubatch=32)
    paged, stats = paged_trace(tiny_model, LONG, "min", n_ubatch=32, n_gpu_layers=3)
    assert_equal(paged, stock)
    assert 0 < stats["n_layers"] < 6


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_two_threads(native, synthetic, stock_trace, kind):
    threads = {"n_threads": 2, "n_threads_batch": 2}
    stock = stock_trace(synthetic(type=kind), n_prompt=LONG, n_decode=2, n_ubatch=32, **threads)
    paged, _ = paged_trace(synthetic(type=kind), LONG, "min", n_decode=2, n_ubatch=32, **threads)
    assert_equal(paged, stock)


def test_off_after_the_library_was_loaded(native, tiny_model, stock_trace):
    stock = stock_trace(tiny_model, n_prompt=LONG, n_ubatch=32)
    off, stats = paged_trace(tiny_model, LONG, None, n_ubatch=32)
    assert_equal(off, stock)
    assert not stats["active"]
