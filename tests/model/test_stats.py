# SPDX-License-Identifier: MIT
"""RotaryStats: a dict that cannot be changed, typed attributes, and the library's own figures."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping, MutableMapping
from typing import get_type_hints

import pytest

from rotary_llamacpp import LayerStats, Llama, RotaryStats
from rotary_llamacpp.native import pools as native_pools
from tests.support.tracing import OPTIONS

KINDS = {"path", "store", "io"}  # numbers of the library, by name in Python
RATES = {"hit_rate", "read_bandwidth", "prefetch_accuracy", "prefetch_coverage", "prefetch_timeliness"}
CHOICES = {"active", "reason", "inner_device", "policy", "predictor", "profile", "notices", "layers"}


@pytest.fixture(scope="module")
def llama(native, tiny_model):
    with Llama(str(tiny_model), rotary={"budget": "25%", "store": "direct"}, **OPTIONS) as made:
        made.create_completion("In the beginning", max_tokens=8)
        yield made


@pytest.fixture
def stats(llama):
    return llama.rotary_stats()


def native_fields(native, struct):
    """Names of a struct's fields, and which of them are numbers of the library's own counting."""
    return {name for name, _ in native.ffi.typeof(struct).fields} - {"reserved"}


def test_every_figure_of_the_library_is_typed_and_no_other(native):
    ours = get_type_hints(RotaryStats)
    theirs = native_fields(native, "rotary_stats") - {"n_notices"}  # notices are there themselves
    assert set(ours) == theirs | RATES | CHOICES
    assert all(ours[name] is (str if name in KINDS else int) for name in theirs - {"repacked"})
    layers = get_type_hints(LayerStats)
    theirs = native_fields(native, "rotary_layer_stats")
    assert set(layers) == theirs | {"hit_rate"}
    assert all(layers[name] is (str if name in KINDS else int) for name in theirs)
    assert all(ours[name] == float | None for name in RATES) and layers["hit_rate"] == float | None


def test_figures_are_those_that_the_library_reports(llama, stats):
    pools = llama._rotary.pools
    reported = pools.stats()
    assert {name: stats[name] for name in reported if name in stats} == {
        name: value for name, value in reported.items() if name != "n_notices"
    }
    assert len(stats.layers) == 6
    for layer, theirs in zip(stats.layers, pools.layer_stats(), strict=True):
        assert layer == {**theirs, "hit_rate": theirs["hits"] / theirs["requests"]}
    assert stats.requests == sum(layer.requests for layer in stats.layers) > 0


def test_types_of_values(stats):
    for figures in (stats, *stats.layers):
        for name, kind in get_type_hints(type(figures)).items():
            value = getattr(figures, name)
            assert value is figures[name]
            if name not in ("notices", "layers"):
                assert isinstance(value, kind) and (kind is not int or type(value) is int), name
    assert [type(layer) for layer in stats.layers] == [LayerStats] * 6


def test_the_same_keys_paged_or_not(stats, tiny_model):
    with Llama(str(tiny_model), rotary=None, **OPTIONS) as off:
        other = off.rotary_stats()
    assert set(other) == set(stats) == set(get_type_hints(RotaryStats))
    assert other.active is False and other.reason == "rotary is off" and other.layers == []
    assert other.hit_rate is None and other.store == "none" and other.hits == 0


def test_a_mapping_that_json_takes(stats):
    assert isinstance(stats, Mapping) and isinstance(stats, dict)
    plain = stats.to_dict()
    assert type(plain) is dict and {type(layer) for layer in plain["layers"]} == {dict}
    assert plain == stats == dict(stats)
    for each in (stats, dict(stats), plain):
        assert json.loads(json.dumps(each)) == plain
    plain["layers"][0]["hits"] = plain["hits"] = -1
    plain["notices"].append("")
    assert stats.hits >= 0 and stats.layers[0].hits >= 0 and "" not in stats.notices


CHANGES = {
    "item": lambda figures: figures.__setitem__("hits", 0),
    "new item": lambda figures: figures.__setitem__("mine", 0),
    "del": lambda figures: figures.__delitem__("hits"),
    "attribute": lambda figures: setattr(figures, "hits", 0),
    "del attribute": lambda figures: delattr(figures, "hits"),
    "update": lambda figures: figures.update(hits=0),
    "|=": lambda figures: figures.__ior__({"hits": 0}),
    "setdefault": lambda figures: figures.setdefault("mine", 0),
    "pop": lambda figures: figures.pop("hits"),
    "popitem": lambda figures: figures.popitem(),
    "clear": lambda figures: figures.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_cannot_be_changed(stats, change):
    for figures in (stats, stats.layers[0]):
        before = dict(figures)
        with pytest.raises(TypeError, match="snapshot"):
            change(figures)
        assert figures == before


def test_every_way_to_change_a_dict_is_refused():
    ways = {name for name in vars(MutableMapping) if name in vars(dict) and name != "__doc__"} | {"__ior__"}
    assert {"__setitem__", "update", "pop"} < ways
    assert all(getattr(RotaryStats, name) is RotaryStats._refuse for name in ways)


def test_copies_and_pickles(stats):
    for again in (copy.copy(stats), copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert type(again) is RotaryStats and again == stats
        assert type(again.layers[0]) is LayerStats
    assert type(stats | {"mine": 1}) is dict


def test_what_editors_and_readers_see(stats):
    assert {"hits", "to_dict"} <= set(dir(stats)) and repr(stats).startswith("RotaryStats({'active': True")
    with pytest.raises(AttributeError, match="'RotaryStats' has no figure 'hit_rat'"):
        stats.hit_rat  # noqa: B018
    assert not hasattr(stats.layers[0], "notices")


def test_a_snapshot_stays_as_it_was(llama):
    before = llama.rotary_stats()
    kept = before.to_dict()
    llama.create_completion("And the king", max_tokens=4)
    after = llama.rotary_stats()
    assert before == kept and after.requests > before.requests
    assert after.layers[0].requests > before.layers[0].requests
    after.notices.append("mine")
    assert "mine" not in llama.rotary_stats().notices


def test_sums_of_several_devices_have_the_same_figures(stats):
    pools = native_pools.Pools.__new__(native_pools.Pools)
    one = {name: value for name, value in stats.items() if name not in CHOICES | RATES}
    pools._pools = [type("Pool", (), {"stats": lambda self: dict(one)})() for _ in range(2)]
    merged = pools.stats()
    assert set(merged) == set(one)
    assert merged["hits"] == 2 * stats.hits and merged["n_expert"] == stats.n_expert
    assert (merged["store"], merged["path"]) == (stats.store, stats.path)
