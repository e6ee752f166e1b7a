# SPDX-License-Identifier: MIT
"""Predictors: hand-solved predictions; native and Python predictors agree, by call and in a model;
user-defined ones; the fallback for routers that cannot be applied early."""

from __future__ import annotations

import numpy as np
import pytest

from rotary_llamacpp import RotaryConfig, predictors
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.native import replay as _replay
from rotary_llamacpp.traces import profiles
from tests.support.paged import assert_equal, notices, paged_trace

DIRECT = {"budget": "min", "store": "direct", "repack": False}
PLAIN = {"use_extra_bufts": False}


def pair(native, name, n_layers, n_expert, n_used):
    return (
        _replay.NativePredictor(native, name, n_layers, n_expert, n_used),
        predictors.REFERENCES[name](n_layers, n_expert, n_used),
    )


# Two layers of 8 experts, 2 used; three tokens, as [layer 0, layer 1].
TOKENS = [([0, 1], [4, 5]), ([0, 2], [4, 6]), ([3, 1], [7, 5])]
# Then layer 0 of a fourth token chooses 0 and 3. Predictions for layer 1:
#   previous    7 5, the last choice in its order
#   popular     4 and 5 twice, 5 more recently; then 7 and 6, the more recent first
#   transition  0 has 3 uses with this one, followed by 4 twice, 5 and 6 once, of 3 + 1; 3 has 2 uses,
#               followed by 7 and 5 once, of 2 + 1: 5 has 1/4 + 1/3, 4 1/2, 7 1/3, 6 1/4
#   similar     each earlier token shares one of two experts: 4 and 5 score two, 6 and 7 one; then by number
HAND = {"previous": [7, 5], "popular": [5, 4, 7, 6], "transition": [5, 4, 7, 6], "similar": [4, 5, 6, 7]}


@pytest.mark.parametrize("name", HAND)
def test_hand_solved(native, name):
    for predictor in pair(native, name, 2, 8, 2):
        for first, second in TOKENS:
            predictor.note(0, [first])
            predictor.note(1, [second])
        predictor.note(0, [[0, 3]])
        assert predictor.name(0, 1, 4) == HAND[name]
        assert predictor.name(0, 1, 1) == HAND[name][:1]


@pytest.mark.parametrize("name", predictors.FROM_ROUTINGS)
def test_nothing_is_known_at_first(native, name):
    for predictor in pair(native, name, 3, 8, 2):
        predictor.note(0, [[1, 2]])
        assert predictor.name(0, 1, 2) == predictor.name(0, 2, 2) == []


@pytest.mark.parametrize("name", predictors.FROM_ROUTINGS)
@pytest.mark.parametrize("seed", range(4))
def test_native_and_python_agree(native, name, seed):
    rng = np.random.default_rng(seed)
    n_layers, n_expert, n_used = 4, int(rng.integers(8, 40)), int(rng.integers(1, 5))
    native_one, python = pair(native, name, n_layers, n_expert, n_used)
    if seed % 2:
        profile = profiles.Profile(
            list(range(n_layers)), rng.random((n_layers, n_expert), np.float32),
            rng.random((n_layers - 1, n_expert, n_expert)).astype(np.float16), 100, {},
        )  # fmt: skip
        native_one.learn(profile)
        python.learn(profile)
    favourites = rng.permutation(n_expert)
    n_named = 0
    for _ in range(120):
        n_tokens = int(rng.choice([1, 1, 1, 3, 250]))
        for layer in range(n_layers):
            if layer == n_layers - 1:  # the last layer computes the last tokens alone
                n_tokens = min(n_tokens, 2)
            skewed = np.minimum(rng.geometric(0.1, (n_tokens, 200)) - 1, n_expert - 1)
            ids = [favourites[list(dict.fromkeys(row.tolist()))[:n_used]].tolist() for row in skewed]
            native_one.note(layer, ids)
            python.note(layer, ids)
            for ahead in range(layer + 1, n_layers):
                named = native_one.name(layer, ahead, n_used)
                assert named == python.name(layer, ahead, n_used)
                n_named += len(named)
    assert n_named > 400


@pytest.mark.parametrize("name", predictors.FROM_ROUTINGS)
@pytest.mark.parametrize("which", ["qwen", "gemma"])
def test_real_routing(native, shared_trace, name, which):
    trace = shared_trace(which)
    trace = trace.select(trace.step < 40)
    both = pair(native, name, len(trace.layers), trace.n_expert, trace.experts.shape[1])
    right = 0
    index = np.searchsorted(trace.layers, trace.layer)
    for layer, experts in zip(index.tolist(), trace.experts.tolist(), strict=True):
        named = [predictor.name(layer - 1, layer, predictor.n_used) if layer else [] for predictor in both]
        assert named[0] == named[1]
        right += len(set(named[0]) & set(experts))
        for predictor in both:
            predictor.note(layer, [experts])
    assert right > 0.1 * trace.experts.size, "more than chance"


def test_profiles_are_begun_with(native):
    # No token was seen; the profile says that 1 in layer 0 is followed by 6.
    pairs = np.zeros((1, 8, 8), np.float16)
    pairs[0, 1, 6] = 0.75
    profile = profiles.Profile([0, 1], np.full((2, 8), 0.25, np.float32), pairs, 40, {})
    for name in ("transition", "mixed"):
        for predictor in pair(native, name, 2, 8, 1):
            predictor.learn(profile)
            predictor.note(0, [[1]])
            assert predictor.name(0, 1, 3) == [6]


# ---- in a model


@pytest.mark.model
@pytest.mark.parametrize("name", predictors.FROM_ROUTINGS)
def test_in_a_model(native, tiny_model, stock_trace, name):
    found = []
    for prefetch in (name, predictors.REFERENCES[name]):
        paged, stats = paged_trace(tiny_model, 40, {**DIRECT, "prefetch": prefetch}, n_decode=30)
        assert_equal(paged, stock_trace(tiny_model, n_prompt=40, n_decode=30, **PLAIN))
        found.append(stats)
    native_one, python = found
    assert native_one["predictor"] == name
    assert python["predictor"] == predictors.REFERENCES[name].__name__
    for stats in found:
        assert stats["predicted"] >= stats["predicted_right"] > 0 and stats["prefetch_used"] > 0
        assert notices(stats) == []


@pytest.mark.model
def test_routers_are_the_default(native, tiny_model):
    for prefetch in (True, "auto", "router"):
        _, stats = paged_trace(tiny_model, 20, {**DIRECT, "prefetch": prefetch})
        assert stats["predictor"] == "router" and stats["predicted_right"] > 0
    for rotary in ({**DIRECT, "prefetch": False}, {**DIRECT, "store": "mmap"}):
        _, stats = paged_trace(tiny_model, 20, rotary)
        assert stats["predictor"] == "" and stats["predicted"] == 0


@pytest.mark.model
@pytest.mark.parametrize("prefetch", ["auto", "router"])
def test_routers_that_cannot_be_read(synthetic, exact, prefetch):
    # The CPU repacks a quantised router, which then cannot be read: announced, and logits are right.
    model = synthetic(type="q4_0", routers="q4_0")
    stats = exact(model, 40, {"budget": "min", "store": "direct", "prefetch": prefetch}, 40)
    [notice] = notices(stats)
    assert "the router of layer 0, and maybe others, cannot be applied early" in notice
    if prefetch == "auto":
        assert "predicted from routings, less well (mixed)" in notice
        assert stats["predictor"] == "router, mixed" and stats["predicted_right"] > 0
    else:
        assert "not prefetched" in notice and stats["predicted"] == 0


@pytest.mark.model
def test_a_profile_is_learnt_from(native, tiny_model, tmp_path):
    from rotary_llamacpp.runtime.recording import record

    trace = record(
        str(tiny_model), ["The whale"], 40, RotaryConfig(budget="50%", verbose=False), seed=1, n_ctx=256
    )
    profiles.learn([trace]).save(tmp_path / "a.profile")
    learnt, named = [], []

    class Watched(predictors.Transition):
        def learn(self, profile):
            learnt.append(profile)
            super().learn(profile)

        def name(self, layer, ahead, n):
            named[-1].append(super().name(layer, ahead, n))
            return named[-1][-1]

    # One token only: whether later tokens are predicted depends on the measured cost of predictions.
    right = {}
    for profile in ("off", str(tmp_path / "a.profile")):
        for prefetch in ("transition", Watched):
            named.append([])
            rotary = {**DIRECT, "profile": profile, "prefetch": prefetch}
            _, stats = paged_trace(tiny_model, 1, rotary, n_decode=1)
            right[profile, prefetch] = stats["predicted_right"]
    assert [each.n_tokens for each in learnt] == [trace.tokens()]
    _, without, _, with_one = named
    assert without[0] == [] and len(with_one[0]) == 4
    for prefetch in ("transition", Watched):
        assert right[str(tmp_path / "a.profile"), prefetch] > right["off", prefetch]


# ---- user-defined


class Nonsense(predictors.Previous):
    def name(self, layer, ahead, n):
        return [-1, 999, *range(100)]


@pytest.mark.model
def test_names_that_are_none(tiny_model, exact):
    stats = exact(tiny_model, 20, {**DIRECT, "prefetch": Nonsense})
    assert 0 < stats["predicted"] <= 2 * stats["lookups"], "two of four are no experts"


def test_unknown_predictors(native):
    with pytest.raises(RotaryError, match="predictor oracle: not known; auto,router,previous,"):
        _replay.NativePredictor(native, "oracle", 2, 8, 2)
    with pytest.raises(
        RotaryError, match="prefetch 'oracle': not known; give one of True, False, auto, router, previous"
    ):
        RotaryConfig(prefetch="oracle")
    with pytest.raises(RotaryError, match="split 'odd': not known; give one of adaptive, even"):
        RotaryConfig(split="odd")
    names = native.text(native.c.rotary_predictor_names())
    assert names == ",".join(predictors.FROM_ROUTINGS) == ",".join(predictors.REFERENCES)
