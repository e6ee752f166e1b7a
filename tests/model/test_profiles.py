# SPDX-License-Identifier: MIT
"""Profiles: learning solved by hand, writing and reading, and runs that begin with a profile."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.native.pools import Pools
from rotary_llamacpp.traces import profiles
from tests.support.paged import assert_equal, make, paged_trace
from tests.support.processes import apart
from tests.support.routings import made, numbered
from tests.support.tracing import trace


def test_learnt_by_hand():
    # Two tokens in two layers: layer 0 chooses 1 and 2, then 1 and 3; layer 1 chooses 4 and 5, then 4 and 6.
    first = made([[[1, 2], [4, 5]], [[1, 3], [4, 6]]])
    found = profiles.learn([first])
    assert found.n_tokens == 2 and found.layers == [0, 1]
    assert found.popularity[0].tolist() == [0, 1, 0.5, 0.5, 0, 0, 0, 0]
    assert found.popularity[1].tolist() == [0, 0, 0, 0, 1, 0.5, 0.5, 0]
    assert found.pairs[0, 1].tolist() == [0, 0, 0, 0, 1, 0.5, 0.5, 0], "1 was used twice"
    assert found.pairs[0, 3].tolist() == [0, 0, 0, 0, 1, 0, 1, 0]
    assert found.ranked(0) == [1, 2, 3] and found.ranked(1) == [4, 5, 6]
    both = profiles.learn([first, made([[[7, 1], [0, 1]]])])
    assert both.n_tokens == 3 and both.popularity[0, 1] == 1 and both.popularity[0, 7] == pytest.approx(1 / 3)
    with pytest.raises(RotaryError, match="a profile is for one model"):
        profiles.learn([first, made([[[1, 2]]])])


def test_no_room_for_pairs():
    with pytest.raises(RotaryError, match=r"traces: .* pairs of experts"):
        profiles.learn([made([[[1], [2]]], n_expert=1 << 16)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda profile: {"pairs": profile.pairs.astype(complex)},
        lambda profile: {"pairs": profile.pairs.astype("M8[s]")},
        lambda profile: {"pairs": profile.pairs.astype(np.float32) + np.nan},
        lambda profile: {"popularity": profile.popularity - np.inf},
        lambda profile: {"popularity": profile.popularity.astype(np.float64) * 1e300},
        lambda profile: {"layers": [0, 0]},
        lambda profile: {"layers": [0, 2**40]},
        lambda profile: {"n_tokens": 2**70},
    ],
)
def test_archives_of_something_else(tmp_path, spoil):
    path, good = tmp_path / "bad.profile", numbered(n_layers=2)
    changes = spoil(good)
    for name, value in changes.items():
        setattr(good, name, value)
    good.save(path)
    with pytest.raises(RotaryError, match="not a profile"):
        profiles.load(path)


def test_written_and_read(tmp_path):
    path = profiles.beside(tmp_path / "model.gguf")
    assert path.name == "model.gguf.profile"
    first = numbered(first=5)
    first.save(path)
    again = profiles.load(path)
    assert (again.popularity == first.popularity).all() and (again.pairs == first.pairs).all()
    assert (again.layers, again.n_tokens) == (first.layers, 100)
    whole = path.read_bytes()
    for n in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(RotaryError, match="not a profile"):
            profiles.load(path)
    with pytest.raises(RotaryError, match="cannot be read"):
        profiles.load(tmp_path / "none")


@pytest.mark.model
@pytest.mark.parametrize("store", ["mmap", "direct"])
@pytest.mark.parametrize("repack", [True, False])
def test_a_run_that_begins_with_one(native, tiny_model, stock_trace, tmp_path, store, repack):
    path = tmp_path / "own.profile"
    numbered(first=20).save(path)
    config = {"budget": "25%", "store": store, "repack": repack, "profile": str(path)}
    llama = make(tiny_model, config, n_ubatch=16)
    stats = llama.rotary_stats()
    assert stats["profile"] == str(path) and stats["bytes_paged"] == 0
    assert [layer["n_resident"] for layer in stats["layers"]] == [8] * 6 == [stats["n_slots"]] * 6
    assert_equal(trace(llama, 60), stock_trace(tiny_model, n_prompt=60, use_extra_bufts=repack, n_ubatch=16))
    llama.rotary_set_budget("50%")
    assert [layer["n_resident"] for layer in llama.rotary_stats()["layers"]] == [16] * 6, "half are known"
    assert_equal(trace(llama, 60), stock_trace(tiny_model, n_prompt=60, use_extra_bufts=repack, n_ubatch=16))
    llama.close()


def predictions_from_pairs(model, monkeypatch, n_before, again):
    """What two tokens were predicted to want: how many, and how many rightly."""
    prepare = Pools.prepare

    def learn_and_prepare(pools):
        pairs, [pool] = np.ones((16, 16), np.float32), pools._pools
        pool.learn(0, np.ones(n_before, np.float32), None, 100)
        pool.learn(1, pairs[0], pairs, 100)
        pool.learn(1, pairs[0], pairs if again else None, 100)
        prepare(pools)

    with monkeypatch.context() as patch:
        patch.setattr(Pools, "prepare", learn_and_prepare)
        llama = make(model, {"budget": "50%", "store": "direct", "prefetch": "transition"})
    llama.eval([7])
    llama.eval([10])  # routed to other experts than 7, in the first layer
    stats = llama.rotary_stats()
    llama.close()
    assert stats["predictor"] == "transition"
    return stats["predicted"], stats["predicted_right"]


@pytest.mark.model
def test_pairs_with_the_layer_before(native, synthetic, monkeypatch):
    # They weigh only by the popularity of a layer of as many experts, and only as handed over last.
    model = synthetic(layers=2)
    learnt, *others = [
        predictions_from_pairs(model, monkeypatch, n_before, again)
        for n_before, again in ((16, True), (16, False), (64, True), (15, True))
    ]
    assert learnt[0] == 4 and others == [(0, 0)] * 3, (learnt, others)


def first_tokens(model, path):
    llama = make(model, {"budget": "25%", "profile": path, "policy": "lru", "prefetch": False}, n_ubatch=16)
    llama.eval([7])
    stats = llama.rotary_stats()
    llama.close()
    return stats


@pytest.mark.model
def test_the_first_token_hits(native, tiny_model, tmp_path):
    # The profile comes from a run of the same model, so that it knows the first token's experts.
    from rotary_llamacpp import RotaryConfig
    from rotary_llamacpp.runtime.recording import record

    path = tmp_path / "own.profile"
    cold = apart(first_tokens, tiny_model, "off")
    config = RotaryConfig(budget="25%", verbose=False)
    found = record(str(tiny_model), ["In the beginning"], 30, config, n_ctx=64)
    profiles.learn([found]).save(path)
    warm = apart(first_tokens, tiny_model, str(path))
    assert cold["hits"] == 0 < warm["hits"] and cold["requests"] == warm["requests"]
    assert warm["profile"] == str(path) and cold["profile"] is None


@pytest.mark.model
def test_beside_the_model(native, tiny_model, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copy(tiny_model, model)
    numbered().save(profiles.beside(model))
    _, stats = paged_trace(model, 8, {"budget": "25%"})
    assert stats["profile"] == str(profiles.beside(model)) and stats["notices"] == []
    _, stats = paged_trace(model, 8, {"budget": "25%", "profile": "off"})
    assert stats["profile"] is None
    wrong = {"another model's": numbered(n_layers=5), "damaged": None}
    for kind, profile in wrong.items():
        if profile is not None:
            profile.save(profiles.beside(model))
        else:
            profiles.beside(model).write_bytes(b"PK")
        _, stats = paged_trace(model, 8, {"budget": "25%"})
        [notice] = stats["notices"]
        assert stats["profile"] is None and "slots begin empty" in notice, kind
        with pytest.raises(RotaryError):
            make(model, {"budget": "25%", "profile": str(profiles.beside(model))})


@pytest.mark.model
def test_from_the_command_line(tiny_model, tmp_path, rotary_command):
    recorded, path = tmp_path / "a.trace", tmp_path / "own.profile"
    (tmp_path / "prompts").write_text("In the beginning\n")
    assert not rotary_command(
        "trace", tiny_model, "--prompts", tmp_path / "prompts", "-o", recorded, "-n", "20"
    ).returncode
    ran = rotary_command("profile", tiny_model, recorded, "-o", path)
    assert ran.returncode == 0 and "tokens, 6 layers of 32 experts" in ran.stdout
    ran = rotary_command("run", tiny_model, "-p", "x", "-n", "2", "--budget", "25%", "--profile", path)
    assert ran.returncode == 0 and "slots begin with the experts of own.profile" in ran.stderr
    options = ("--link", "1GB/s", "--predictors", "transition,mixed", "--budgets", "25", "--policies", "lru")
    ran = rotary_command("simulate", recorded, *options, "--profile", path)
    assert ran.returncode == 0, ran.stderr
    numbered(n_layers=5).save(path)
    for command in (("simulate", recorded, *options), ("run", tiny_model, "-p", "x", "--budget", "25%")):
        ran = rotary_command(*command, "--profile", path)
        assert ran.returncode == 2 and "5 layers of 32 experts" in ran.stderr, ran.stderr
