# SPDX-License-Identifier: MIT
"""Eviction policies: hand-solved traces; native and Python policies agree, by request and in a model."""

from __future__ import annotations

import numpy as np
import pytest

from rotary_llamacpp import RotaryConfig, policies
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.native import replay as _replay
from tests.support.paged import make


def row(*ids):
    return np.array([ids], np.int32)


def evictions(native, policy, n_slots, requests, n_expert=8):
    """The victim of each request of one expert; None where nothing is evicted."""
    cache = _replay.Cache(native, policy, n_expert, [n_slots])
    found = []
    for expert in requests:
        loads = cache.resolve(0, row(expert))
        found.append(loads[0][2] if loads and loads[0][2] >= 0 else None)
    return found


# 3 slots and single requests: 0 1 2 fill the slots, and 0 is requested again.
#   lru      3 evicts 1, the oldest; 4 evicts 2; 0 hits; 1 evicts 3, then the oldest
#   lfu      0 has two uses: 3 evicts 1, the older of the others; 4 evicts 2; 1 evicts 3, older than 4
#   sieve    0 is marked: 3 passes it and evicts 1; the hand is at 2, which 4 evicts; 1 evicts 3, behind it
#   s3fifo   the small queue exceeds its 1 slot, and one use since it came does not keep 0: 3 evicts 0, 4
#            evicts 1; 0, remembered, enters the main queue and evicts 2; so does 1 and evicts 3, oldest small
#   arc      3 evicts 1, the oldest used once; 4 evicts 2; 1, remembered, raises the target of the experts
#            used once by a slot, but these have two: 3 is evicted
HAND = {
    "lru": [None, None, None, None, 1, 2, None, 3],
    "lfu": [None, None, None, None, 1, 2, None, 3],
    "sieve": [None, None, None, None, 1, 2, None, 3],
    "s3fifo": [None, None, None, None, 0, 1, 2, 3],
    "arc": [None, None, None, None, 1, 2, None, 3],
}


@pytest.mark.parametrize("name", HAND)
def test_hand_solved(native, name):
    requests = [0, 1, 2, 0, 3, 4, 0, 1]
    assert evictions(native, name, 3, requests) == HAND[name]
    assert evictions(native, policies.REFERENCES[name], 3, requests) == HAND[name]


def test_weights_count(native):
    # Two slots; 0 was chosen with little weight, twice, 1 with much, once.
    for policy in ("weighted", policies.Weighted):
        cache = _replay.Cache(native, policy, 4, [2])
        for expert, weight in ((0, 0.01), (0, 0.01), (1, 0.81)):
            cache.resolve(0, row(expert), np.array([[weight]], np.float32))
        assert cache.resolve(0, row(2), np.array([[0.5]], np.float32)) == [(2, 0, 0)]


def test_recall(native):
    # Layer 1 repeats 6 4 7 5 in two slots. Frequency and recency keep the last experts; recall keeps those
    # that followed similar tokens.
    def hits(policy):
        cache = _replay.Cache(native, policy, 8, [8, 2])
        n_hits = 0
        for token in range(80):
            cache.resolve(0, row(token % 4))
            n_hits += not cache.resolve(1, row((6, 4, 7, 5)[token % 4])) and token >= 40
        return n_hits

    assert hits("lru") == hits("lfu") == 0
    assert hits("recall") == hits(policies.Recall) >= 10


@pytest.mark.parametrize("name", policies.NATIVE)
@pytest.mark.parametrize("seed", range(4))
def test_native_and_python_agree(native, name, seed):
    rng = np.random.default_rng(seed)
    n_expert, n_layers = int(rng.integers(6, 40)), 3
    n_slots = [int(rng.integers(5, n_expert + 1)) for _ in range(n_layers)]
    pair = [_replay.Cache(native, policy, n_expert, n_slots) for policy in (name, policies.REFERENCES[name])]
    favourites = rng.permutation(n_expert)
    ahead = [[] for _ in range(n_layers)]
    for request in range(500):
        layer = request % n_layers
        n_used = int(rng.integers(1, 6))
        n_tokens = 1 if n_used > 2 else int(rng.integers(1, 3))
        skewed = np.minimum(rng.geometric(0.15, (n_tokens, 64)) - 1, n_expert - 1)
        ids = np.stack([favourites[list(dict.fromkeys(each))[:n_used]] for each in skewed]).astype(np.int32)
        weights = rng.random(ids.shape, np.float32) if seed % 2 else None
        for expert in ahead[layer]:
            if expert not in ids:
                arrived = bool(rng.integers(2))
                for cache in pair:
                    cache.end_reservation(layer, expert, arrived)
        ahead[layer] = []
        loads = [cache.resolve(layer, ids, weights) for cache in pair]
        assert loads[0] == loads[1], request
        wanted = int(rng.integers(n_expert))
        if request % 4 == 0 and not pair[0].is_resident(layer, wanted) and n_slots[layer] > 10:
            assert len({cache.reserve(layer, wanted, [1, 2]) for cache in pair}) == 1
            ahead[layer].append(wanted)


@pytest.mark.parametrize("name", policies.NATIVE)
def test_one_tokens_slots_are_enough_to_hit(native, name):
    # With as many slots as a token uses, in several layers, experts that stay the same are paged in once.
    cache = _replay.Cache(native, name, 64, [4] * 5)
    for token in range(50):
        for layer in range(5):
            assert len(cache.resolve(layer, row(7, 1, 60, 3))) == (4 if token == 0 else 0)


@pytest.mark.parametrize("name", policies.NATIVE)
@pytest.mark.parametrize("which", ["qwen", "gemma"])
def test_real_routing(native, shared_trace, name, which):
    trace = shared_trace(which)
    trace = trace.select(trace.step < 60)
    index = np.searchsorted(trace.layers, trace.layer).astype(np.int32)
    ids, weights = np.ascontiguousarray(trace.experts), np.ascontiguousarray(trace.weights)
    slots = [16] * len(trace.layers)
    found = [
        _replay.Cache(native, policy, trace.n_expert, slots).replay(index, ids, weights)
        for policy in (name, policies.REFERENCES[name])
    ]
    assert found[0] == found[1]


# ---- in a model


@pytest.mark.model
@pytest.mark.parametrize("name", policies.NATIVE)
def test_in_a_model(native, tiny_model, name):
    found = []
    for policy in (name, policies.REFERENCES[name]):
        llama = make(tiny_model, {"budget": "25%", "policy": policy}, n_ubatch=16)
        llama.create_completion("In the beginning God created", max_tokens=24, temperature=0)
        llama.rotary_set_budget("50%")
        llama.create_completion("In the beginning God created", max_tokens=24, temperature=0)
        found.append(llama.rotary_stats())
        llama.close()
    native_one, python = found
    assert native_one["policy"] == name and python["policy"] == policies.REFERENCES[name].__name__
    for figure in ("requests", "hits", "misses", "evictions"):
        assert native_one[figure] == python[figure] > 0, figure


class Nonsense(policies.Lru):
    def choose(self, candidates):
        return -5


def test_a_choice_that_is_none(native):
    assert evictions(native, Nonsense, 2, [0, 1, 2, 3]) == [None, None, 0, 2], "the first of the residents"


@pytest.mark.model
def test_auto(native, tiny_model):
    llama = make(tiny_model, {"budget": "25%"})
    assert llama.rotary_stats()["policy"] == "recall"
    llama.close()


def test_unknown_policies(native):
    with pytest.raises(RotaryError, match="policy mru: not known; auto,lru,"):
        _replay.Cache(native, "mru", 8, [2])
    with pytest.raises(RotaryError, match="layer 1 has 9 slots for 8 experts"):
        _replay.Cache(native, "lru", 8, [2, 9])
    with pytest.raises(RotaryError, match="policy 'mru': not known; give one of auto, lru, "):
        RotaryConfig(policy="mru")
    assert native.text(native.c.rotary_policy_names()) == ",".join(policies.NATIVE)


@pytest.mark.parametrize("layer", [-1, 2])
def test_unknown_layers(native, layer):
    cache, slot_ids, loads = _replay.Cache(native, "lru", 8, [2, 2]), [0], native.ffi.new("rotary_load[]", 2)
    resolve, status = native.c.rotary_cache_resolve, native.c.ROTARY_ERR_ARG
    assert resolve(cache._cache, layer, [0], native.ffi.NULL, 1, 1, slot_ids, loads) == status
    with pytest.raises(RotaryError, match=r"a row wants .* experts that do not exist"):
        cache.replay(np.array([layer], np.int32), row(0))
