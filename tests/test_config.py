# SPDX-License-Identifier: MIT
"""Every accepted form of a budget, every refusal, and what turns paging off."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from conftest import ROOT

from rotary_llamacpp.config import Budget, RotaryConfig, parse_bytes
from rotary_llamacpp.errors import BudgetError, RotaryError
from rotary_llamacpp.info import ModelInfo


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("auto", "auto"), (" MIN ", "min"), ("25%", "25%"), ("12.5 %", "12.5%"), (0.25, "25%"), (1.0, "100%"),
        ("8GiB", str(8 << 30)), ("8g", str(8 << 30)), ("1.5 KiB", "1536"), ("2GB", "2000000000"),
        ("512b", "512"), ("1000000", "1000000"), (1000000, "1000000"), (1, "1"),
        ("9007199254740993", "9007199254740993"), ("16 slots", "16 slots"), ("1 slot", "1 slots"),
    ],
)  # fmt: skip
def test_budget_forms(value, text):
    assert Budget.parse(value).text == text


@pytest.mark.parametrize(
    "value",
    [
        "",
        "lots",
        "-1",
        "-5%",
        "101%",
        "25%%",
        "8XiB",
        "1.5 slots",
        "nan",
        1.5,
        -0.1,
        -3,
        [],
        object(),
        "0x10",
    ],
)
def test_nonsense_budgets_are_refused(value):
    with pytest.raises(BudgetError, match="budget") as caught:
        RotaryConfig(budget=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "off", [None, False, 0, 0.0, "0", "0%", "off", "none", {"budget": 0}, {"budget": None}]
)
def test_off(off):
    assert RotaryConfig.from_any(off) is None


def test_from_any():
    config = RotaryConfig(budget="25%", inner="CPU", margin="1GiB")
    assert RotaryConfig.from_any(config) is config
    assert RotaryConfig.from_any({"budget": "25%", "inner": "CPU", "margin": "1GiB"}) == config
    assert RotaryConfig.from_any("25%") == RotaryConfig(budget="25%")
    assert RotaryConfig.from_any(True) == RotaryConfig.from_any("auto") == RotaryConfig()
    assert config.margin_bytes == 1 << 30 and RotaryConfig().margin_bytes == 0
    with pytest.raises(RotaryError, match=r"'bugdet'.*known are budget"):
        RotaryConfig.from_any({"bugdet": 1})
    with pytest.raises(RotaryError, match="not a number of bytes"):
        RotaryConfig(margin="25%")
    with pytest.raises(RotaryError, match="inner"):
        RotaryConfig(inner="")


def test_store():
    config = RotaryConfig.from_any({"store": "direct", "prefetch": False, "staging": "64MiB"})
    assert (config.store, config.prefetch, config.staging_bytes) == ("direct", False, 64 << 20)
    default = RotaryConfig()
    assert (default.store, default.prefetch, default.staging_bytes) == ("auto", True, 0)
    for nonsense in ("", "Direct", "disk", None, True, 1, ["mmap"]):
        with pytest.raises(RotaryError, match=r"^store .*not understood; .*auto, mmap, direct; ") as caught:
            RotaryConfig(store=nonsense)
        assert "\n" not in str(caught.value)
    for nonsense in ("much", "25%", "16 slots", -1):
        with pytest.raises(RotaryError, match="not a number of bytes"):
            RotaryConfig(staging=nonsense)


def test_every_option_is_documented():
    readme = (ROOT / "README.md").read_text()
    for field in dataclasses.fields(RotaryConfig):
        assert f"`{field.name}`" in readme, field.name
        assert f"    {field.name} : " in RotaryConfig.__doc__, field.name


def test_is_frozen_and_pickles():
    config = RotaryConfig(budget=0.5)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 1


def test_parse_bytes():
    assert parse_bytes("1KiB") == parse_bytes(1024) == 1024
    with pytest.raises(RotaryError, match="16 slots"):
        parse_bytes("16 slots")


def test_check_against_a_model(tiny_model):
    info = ModelInfo.read(tiny_model)  # 4 of 32 experts used: 12.5 %
    least = info.min_budget_bytes
    for budget in ("auto", "min", "12.5%", "4 slots", least, "1TiB"):
        Budget.parse(budget).check(info, budget)
    for budget in ("12.4%", "3 slots", least - 1, "1"):
        words = rf'tiny-moe.*budget {budget} is .*use "min", "4 slots" or 3MiB'
        with pytest.raises(BudgetError, match=words):
            Budget.parse(budget).check(info, budget)
    Budget.parse("3MiB").check(info, "3MiB")  # what the message names is enough
