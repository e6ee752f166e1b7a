# SPDX-License-Identifier: MIT
"""Slots that move between layers: to which layers, how many, and that logits stay the same."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest

from rotary_llamacpp import policies, simulation
from rotary_llamacpp.native import replay as _replay
from tests.support.paged import make, notices, paged_trace
from tests.support.processes import ONE_ARENA, apart
from tests.support.tracing import trace


def token(*rows):
    """Experts of each layer, as ids for a cache."""
    return [np.array([row], np.int32) for row in rows]


def run(native, layers, n_slots, n_tokens, least, policy="lru", n_expert=32):
    """A cache after `n_tokens` tokens; layers[il](t) are the experts that layer il uses for token t."""
    cache = _replay.Cache(native, policy, n_expert, n_slots, least)
    for t in range(n_tokens):
        for layer, ids in enumerate(token(*(choose(t) for choose in layers))):
            cache.resolve(layer, ids)
    return cache


def narrow(t):
    return [0, 1]


def wide(t):
    """Two of twelve experts, seldom the same for successive tokens."""
    return [(5 * t) % 12, (5 * t + 1 + t // 12) % 12]


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "arc", "recall"])
def test_slots_move_to_where_they_serve(native, policy):
    # Layers that always want the same two experts need two of their eight slots; one that wants twelve needs
    # twelve.
    cache = run(native, [narrow, wide, narrow], [8, 8, 8], 200, least=2, policy=policy)
    slots = cache.slots()
    assert sum(slots) == 24 and slots[1] >= 12 and min(slots) >= 4
    assert all(cache.is_resident(0, expert) and cache.is_resident(2, expert) for expert in (0, 1))
    assert sum(cache.is_resident(1, expert) for expert in range(12)) == 12
    assert run(native, [narrow, wide, narrow], [8, 8, 8], 200, None, policy).slots() == [8, 8, 8]


def test_what_is_alike_keeps_its_slots(native):
    assert run(native, [wide, wide, wide], [6, 6, 6], 300, least=2).slots() == [6, 6, 6]


def test_bounds(native):
    # Never below one token's demand or half of the even share, nor above twice the even share.
    assert run(native, [narrow, wide, narrow], [3, 3, 3], 400, least=2).slots() == [2, 5, 2]
    assert run(native, [narrow, wide, narrow], [5, 5, 5], 400, least=4).slots() == [4, 7, 4]
    full = run(native, [narrow, lambda t: [0, *range(1 + t % 8, 3 + t % 8)]], [12, 12], 300, 3, n_expert=12)
    assert full.slots() == [12, 12], "layers that hold all they have neither give nor take"


def test_what_batches_want_is_left_to_them(native):
    # Two sequences at once want four experts in the outer layers, which keep four slots; with one, three.
    for rows, least in (([[0, 1], [2, 3]], 4), ([[0, 1]], 3)):
        cache = _replay.Cache(native, "lru", 32, [6, 6, 6], 2)
        for t in range(400):
            cache.resolve(0, np.array(rows, np.int32))
            cache.resolve(1, np.array([wide(t)], np.int32))
            cache.resolve(2, np.array(rows, np.int32))
        assert min(cache.slots()) == least and cache.slots()[1] >= 9


class Watched(policies.Lru):
    """Checks that a policy is told of every change of slots, in a consistent state."""

    def __init__(self, *args):
        super().__init__(*args)
        self.there = set()
        self.shared.setdefault("sizes", {})[self.layer] = [self.n_slots]

    def enter(self, expert, wanted):
        super().enter(expert, wanted)
        self.there.add(expert)
        assert len(self.there) <= self.n_slots

    def leave(self, expert):
        self.there.remove(expert)

    def resize(self, n_slots):
        assert abs(n_slots - self.n_slots) == 1 and len(self.there) <= n_slots
        super().resize(n_slots)
        self.shared["sizes"][self.layer].append(n_slots)


def test_policies_are_told(native):
    cache = run(native, [narrow, wide, narrow], [8, 8, 8], 200, least=2, policy=Watched)
    sizes = cache._own._shared["sizes"]
    assert [sizes[layer][-1] for layer in range(3)] == cache.slots() != [8, 8, 8]


@pytest.mark.parametrize("which", ["qwen", "gemma"])
def test_real_routing(native, shared_trace, which):
    trace = shared_trace(which)
    for share, min_gain in ((0.125, -0.003), (0.25, 0.001), (0.5, 0.001)):
        slots = simulation.slots_for(trace, share)
        even, adaptive = (
            simulation.replay(trace, "recall", slots, adaptive=on).hit_rate for on in (False, True)
        )
        assert adaptive - even > min_gain


# ---- in a model


@pytest.mark.model
@pytest.mark.parametrize("store", ["mmap", "direct"])
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize(("shape", "kind"), [("test", "q4_0"), ("test", "q4_k_m"), ("test-gpt-oss", "mxfp4")])
def test_the_same_logits(synthetic, exact, shape, kind, repack, store):
    model = synthetic(shape, type=kind, locality=0.4)
    rotary = {"budget": "6 slots", "store": store, "repack": repack}
    stats = exact(model, 30, rotary, n_decode=150)
    layers = stats["layers"]
    if kind != "q4_k_m":  # its layers give no slots away
        assert stats["slot_moves"] > 0 and len({layer["n_slots"] for layer in layers}) > 1
    assert min(layer["n_slots"] for layer in layers) >= 4
    assert stats["slot_bytes"] == sum(layer["n_slots"] * layer["expert_bytes"] for layer in layers)
    assert stats["slot_bytes"] <= stats["budget_bytes"] and notices(stats) == []


@pytest.mark.model
@pytest.mark.parametrize("store", ["mmap", "direct"])
def test_moves_in_the_trained_model(tiny_model, exact, store):
    rotary = {"budget": "50%", "store": store, "repack": False}
    stats = exact(tiny_model, 30, rotary, n_decode=200)
    slots = [layer["n_slots"] for layer in stats["layers"]]
    assert stats["slot_moves"] > 0 and sum(slots) == 6 * 16 and len(set(slots)) > 1
    _, even = paged_trace(tiny_model, 30, {**rotary, "split": "even"}, n_decode=200)
    assert even["slot_moves"] == 0 and even["n_slots"] == 16


@pytest.mark.model
def test_what_has_moved_stays(native, synthetic):
    # With layers of different sizes some bytes are left over, into which slots must not grow.
    model = synthetic(type="q4_k_m", locality=0.4, layers=6, experts=32)
    llama = make(model, {"budget": "12 slots", "store": "direct", "repack": False})
    found = []
    for _ in range(3):
        trace(llama, 30, 100)
        time.sleep(0.5)  # until memory is checked again
        found.append([layer["n_slots"] for layer in llama.rotary_stats()["layers"]])
    llama.close()
    assert found[0] != [12] * 6 and sum(abs(a - b) for a, b in zip(found[0], found[2], strict=True)) <= 12
    assert all(12 not in (min(slots), max(slots)) for slots in found)


@pytest.mark.model
def test_a_new_budget_is_divided_anew(native, tiny_model):
    llama = make(tiny_model, {"budget": "50%"}, n_ubatch=16)
    llama.create_completion("In the beginning God created", max_tokens=200, temperature=0)
    assert llama.rotary_stats()["slot_moves"] > 0
    llama.rotary_set_budget("25%")
    llama.create_completion("The", max_tokens=1, temperature=0)
    assert {layer["n_slots"] for layer in llama.rotary_stats()["layers"]} == {8}
    llama.close()


def with_little_address_space(model):
    llama = make(model, {"budget": "min", "verbose": False})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (90 << 20), -1))
    llama.rotary_set_budget("60%")
    llama.create_completion("The", max_tokens=4, temperature=0)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    stats = llama.rotary_stats()
    llama.close()
    return stats


@pytest.mark.model
def test_no_address_space_to_move_in(native, synthetic):
    # Below the limit there is room for 9 of 16 slots, 81 MiB, but not for the 15 that a layer may reach.
    model = synthetic(
        "test", type="f16", layers=4, experts=16, used=2, ff=512, embd=768, heads=4, head_dim=64
    )
    stats = apart(with_little_address_space, model, environment=ONE_ARENA)
    [notice] = stats["notices"]
    assert "slots stay as they are divided between layers" in notice and "no memory for" in notice
    assert stats["slot_moves"] == 0 and stats["misses"] > 0
