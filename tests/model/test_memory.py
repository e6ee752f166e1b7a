# SPDX-License-Identifier: MIT
"""Anonymous memory of a paged run stays within the budget plus a constant; mapped files do not count.

A control run with all experts copied shows that the measurement would notice a copy.
"""

from __future__ import annotations

import pytest

from benchmarks.measurement import anonymous_bytes
from rotary_llamacpp.gguf_files.info import ModelInfo
from rotary_llamacpp.native import binding as _native
from rotary_llamacpp.units import MIB
from tests.support.paged import make
from tests.support.processes import apart
from tests.support.tracing import prompt_tokens

# KV cache, compute buffers, logits and thread stacks of the context below, and weights other than experts,
# which the CPU repacks.
CONSTANT_BYTES = 32 * MIB


def measure(model, rotary, options):
    """Bytes that a run adds at its peak, bytes that are left once the model is closed, and statistics."""
    _native.load()
    before = anonymous_bytes()
    llama = make(model, rotary, **{"logits_all": False, "n_ubatch": 64, **options})
    peak = anonymous_bytes()
    tokens = prompt_tokens(llama.n_vocab(), 128)
    for batch in (tokens, *([token] for token in tokens[:24])):
        llama.eval(batch)
        peak = max(peak, anonymous_bytes())
    stats = llama.rotary_stats()
    llama.close()
    return peak - before, anonymous_bytes() - before, stats


@pytest.fixture(scope="module")
def large(synthetic):
    """A model with about 430 MB of experts in Q4_0, which stock would repack, and so copy, on the CPU."""
    return synthetic(type="q4_0", layers=8, embd=1024, ff=1024, experts=32, used=4)


@pytest.mark.slow
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("budget", ["min", "25%"])
def test_stays_within_the_budget(native, large, budget, repack):
    growth, left, stats = apart(measure, large, {"budget": budget, "repack": repack}, {})
    assert stats["active"] and stats["evictions"] > 0, "the run wanted more experts than fit"
    assert stats["slot_bytes"] <= stats["budget_bytes"] <= ModelInfo.read(large).expert_bytes // 4
    assert growth <= stats["budget_bytes"] + CONSTANT_BYTES
    assert left <= CONSTANT_BYTES, "close() gives it back"


@pytest.mark.slow
def test_control_all_experts_copied_would_be_noticed(native, large):
    expert_bytes = ModelInfo.read(large).expert_bytes
    assert expert_bytes // 4 + CONSTANT_BYTES < expert_bytes // 2
    growth, _, _ = apart(measure, large, None, {"use_mmap": False})
    assert growth > expert_bytes
