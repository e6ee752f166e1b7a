# SPDX-License-Identifier: MIT
"""Paging changes no bit: all logits and the greedy tokens equal stock's, with the same kernels on both sides.

Stock runs in a process of its own. Prompts are shorter and longer than n_ubatch; budgets range from one
token's experts to all experts.
"""

from __future__ import annotations

import pytest

from tests.support.paged import assert_equal, paged_trace

BUDGETS = ("min", "25%", "50%", "100%")
SHORT, LONG = 12, 100


@pytest.mark.parametrize("n_prompt", [SHORT, LONG])
@pytest.mark.parametrize("budget", BUDGETS)
def test_tiny_model(tiny_model, exact, budget, n_prompt):
    stats = exact(tiny_model, n_prompt, budget, n_ubatch=32)
    assert stats["active"]
    if budget == "min":
        assert stats["n_slots"] == 4
        assert stats["evictions"] > 0 and stats["misses"] > 0, "the smallest budget really pages"


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q8_0", "q6_k", "f16"])
@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
@pytest.mark.parametrize("repack", [True, False])
def test_quantisations(synthetic, exact, kind, budget, repack):
    model = synthetic(type=kind)
    exact(model, LONG, {"budget": budget, "repack": repack}, n_ubatch=32)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("repack", [True, False])
def test_batches_beyond_the_slots(synthetic, exact, direct, repack):
    # 100 tokens in one ubatch want all 16 experts; 4 have slots. Computed from the mapping, or in waves.
    model = synthetic(type="q4_0")
    rotary = {"budget": "min", "direct": direct, "repack": repack}
    stats = exact(model, LONG, rotary, n_ubatch=128)
    if not direct:
        assert stats["waves"] > 0 and stats["bypassed"] == 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("test-llama", {"type": "q8_0"}),
        ("test-gpt-oss", {"type": "q8_0"}),  # expert biases
        ("test-shared", {"type": "q4_0", "fused": True}),  # gate and up in one tensor, and a shared expert
        ("test", {"type": "q4_k_m"}),  # layers of different sizes
        ("test", {"type": "q8_0", "shards": 3}),
    ],
)
@pytest.mark.parametrize("budget", ["min", "50%"])
def test_architectures_and_files(synthetic, exact, shape, options, budget):
    model = synthetic(shape, **options)
    exact(model, LONG, budget, n_ubatch=32)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_without_mmap(synthetic, exact, kind):
    model = synthetic(type=kind)
    exact(model, LONG, "min", n_ubatch=32, use_mmap=False)


def test_partial_offload(tiny_model, exact):
    stats = exact(tiny_model, LONG, "min", n_ubatch=32, n_gpu_layers=3)
    assert 0 < stats["n_layers"] < 6


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_two_threads(synthetic, exact, kind):
    threads = {"n_threads": 2, "n_threads_batch": 2}
    exact(synthetic(type=kind), LONG, "min", n_decode=2, n_ubatch=32, **threads)


def test_off_after_the_library_was_loaded(native, tiny_model, stock_trace):
    stock = stock_trace(tiny_model, n_prompt=LONG, n_ubatch=32)
    off, stats = paged_trace(tiny_model, LONG, None, n_ubatch=32)
    assert_equal(off, stock)
    assert not stats["active"]
