# SPDX-License-Identifier: MIT
"""All forms of a budget, refused values, and values that turn paging off."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from rotary_llamacpp.config import Budget, RotaryConfig
from rotary_llamacpp.errors import BudgetError, RotaryError
from rotary_llamacpp.gguf_files.info import ModelInfo
from rotary_llamacpp.runtime.paging import check_budget
from rotary_llamacpp.units import parse_bytes, parse_size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("auto", "auto"), (" MIN ", "min"), ("25%", "25%"), ("12.5 %", "12.5%"), (0.25, "25%"), (1.0, "100%"),
        ("8GiB", str(8 << 30)), ("8g", str(8 << 30)), ("1.5 KiB", "1536"), ("2GB", "2000000000"),
        ("512b", "512"), ("1000000", "1000000"), (1000000, "1000000"), (1, "1"),
        ("9007199254740993", "9007199254740993"), ("16 slots", "16 slots"), ("1 slot", "1 slots"),
        # A number with a point and without a unit is a share, like the same float.
        ("0.25", "25%"), (".5", "50%"), ("1.0", "100%"), (" 0.07 ", "7%"), (".5GiB", str(1 << 29)),
        ("0.5%", "0.5%"), (1e-12, "0.0000000001%"), ("0" * 5000 + "7", "7"), ("16.0 slots", "16 slots"),
        (10**17 + 1, str(10**17 + 1)),
    ],
)  # fmt: skip
def test_budget_forms(value, text):
    assert Budget.parse(value).text == text


@pytest.mark.parametrize(
    "value",
    [
        "", "lots", "-1", "-5%", "101%", "25%%", "8XiB", "1.5 slots", "nan", 1.5, -0.1, -3, [], object(),
        "0x10", "1.5", "1.2.3%", ".", ".GiB", "0.5b", "0.0001KiB", "inf", "-inf", "1e400", "1e9", "1e-3%",
        "1 000 000", "٣GiB", "8\u212a",  # the kelvin sign is a k in small letters
        "8\u00a0GiB", "1000000TiB", "3000000000 slots", "9" * 400 + " slots", "9" * 400 + "MiB", "9" * 5000,
        "8GiB\nor more", 10**18, 10**5000, math.inf, -math.inf, math.nan, 1e300, True,
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else f"int{value.bit_length()}",
)  # fmt: skip
def test_nonsense_budgets_are_refused(value):
    with pytest.raises(BudgetError, match="budget") as caught:
        RotaryConfig(budget=value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["1.5", 1.5, "20.0", 20.0])
def test_a_number_that_may_be_percent_or_a_size_is_told_apart(value):
    with pytest.raises(BudgetError, match=r"share of the experts.*write [0-9.]+% or [0-9.]+GiB"):
        Budget.parse(value)


@pytest.mark.parametrize(
    "off",
    [
        None, False, 0, 0.0, "0", "0%", "off", "none", {"budget": 0}, {"budget": None},
        "0.0", " .0 ", "0.00%", "0 slots", "0GiB", "OFF",
    ],
)  # fmt: skip
def test_off(off):
    assert RotaryConfig.from_any(off) is None


def test_from_any():
    config = RotaryConfig(budget="25%", inner="CPU", margin="1GiB")
    assert RotaryConfig.from_any(config) is config
    assert RotaryConfig.from_any({"budget": "25%", "inner": "CPU", "margin": "1GiB"}) == config
    assert RotaryConfig.from_any("25%") == RotaryConfig(budget="25%")
    assert RotaryConfig.from_any(True) == RotaryConfig.from_any("auto") == RotaryConfig()
    assert config.margin_bytes == 1 << 30 and RotaryConfig().margin_bytes == 0
    with pytest.raises(RotaryError, match=r"'bugdet'.*options are budget"):
        RotaryConfig.from_any({"bugdet": 1})
    with pytest.raises(RotaryError, match="not a number of bytes"):
        RotaryConfig(margin="25%")
    with pytest.raises(RotaryError, match="inner"):
        RotaryConfig(inner="")


def test_verbose_is_as_llamas_unless_said():
    assert RotaryConfig().verbose is None
    assert RotaryConfig(verbose=False).verbose is False


def test_store():
    config = RotaryConfig.from_any({"store": "direct", "prefetch": False, "staging": "64MiB"})
    assert (config.store, config.prefetch, config.staging_bytes) == ("direct", False, 64 << 20)
    default = RotaryConfig()
    assert (default.store, default.prefetch, default.staging_bytes) == ("auto", True, 0)
    for nonsense in ("", "Direct", "disk", None, True, 1, ["mmap"]):
        with pytest.raises(RotaryError, match=r"^store .*not known; .*auto, mmap, direct") as caught:
            RotaryConfig(store=nonsense)
        assert "\n" not in str(caught.value)
    for nonsense in ("much", "25%", "16 slots", -1):
        with pytest.raises(RotaryError, match="not a number of bytes"):
            RotaryConfig(staging=nonsense)


def test_every_option_is_in_the_docstring():  # and in docs/python-api.md: tests/docs/test_reference.py
    for field in dataclasses.fields(RotaryConfig):
        assert f"    {field.name} : " in RotaryConfig.__doc__, field.name


def test_is_frozen_and_pickles():
    config = RotaryConfig(budget=0.5)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 1


def test_parse_bytes():
    assert parse_bytes("1KiB") == parse_bytes(1024) == 1024
    assert parse_bytes("0.5KiB") == parse_bytes(".5 kib") == 512
    assert parse_bytes("0") == parse_bytes("0GiB") == 0
    with pytest.raises(RotaryError, match="16 slots"):
        parse_bytes("16 slots")
    for fraction in ("0.25", "1.5", ".5", 0.25):
        with pytest.raises(RotaryError, match=r"bytes have no fractions.*write [0-9.]+GiB"):
            parse_bytes(fraction)
    for nonsense in ("0.5b", "0.0001KiB", "-1GiB", "nan", "inf", "1e400", "9" * 400 + "MiB", "9" * 5000,
                     "٣GiB", 10**5000, -1, 1e300, True, None, b"8"):  # fmt: skip
        with pytest.raises(RotaryError, match=r"^size .*; .*; ") as caught:
            parse_bytes(nonsense)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(RotaryError, match=r"write 0.25GiB"):
        parse_size("0.25")


def test_check_against_a_model(tiny_model):
    info = ModelInfo.read(tiny_model)  # 4 of 32 experts used: 12.5 %
    least = info.min_budget_bytes
    for budget in ("auto", "min", "12.5%", "4 slots", least, "1TiB"):
        check_budget(Budget.parse(budget), info, budget)
    for budget in ("12.4%", "3 slots", least - 1, "1"):
        words = rf'tiny-moe.*budget {budget} is .*use "min", "4 slots" or 3MiB'
        with pytest.raises(BudgetError, match=words):
            check_budget(Budget.parse(budget), info, budget)
    check_budget(Budget.parse("3MiB"), info, "3MiB")  # the budget that the message suggests is enough


def test_a_number_without_end_is_refused_at_once():
    with pytest.raises(RotaryError):
        Budget.parse("9" * 200_000 + "!")  # takes hours if a pattern can match each digit in two places
