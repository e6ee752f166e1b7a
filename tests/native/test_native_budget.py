# SPDX-License-Identifier: MIT
"""Division of a budget into slots, through cffi: cases solved by hand, properties over random layers, and
agreement of the two readers of budget texts, the library's and RotaryConfig's."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from rotary_llamacpp.config import Budget, RotaryConfig
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.native import binding as _native
from tests.support.processes import apart

MIB = 1 << 20
ERR_ARG, ERR_BUDGET = -1, -4


def divide(native, budget, layers, free_bytes=0):
    """(status, slots per layer, bytes); layers are (expert_bytes, n_expert, n_expert_used)."""
    sizes = native.ffi.new("rotary_layer_size[]", [tuple(layer) for layer in layers])
    n_slots = native.ffi.new("int32_t[]", len(layers))
    n_bytes = native.ffi.new("uint64_t *")
    status = native.c.rotary_budget_divide(budget.encode(), sizes, len(layers), free_bytes, n_slots, n_bytes)
    return status, list(n_slots), n_bytes[0]


@pytest.mark.parametrize(
    ("budget", "slots", "n_bytes"),
    [
        # Three layers of 8 experts of 10 bytes, 2 used: 240 bytes in all, 60 at least.
        ("min", [2, 2, 2], 60),
        ("25%", [2, 2, 2], 60),
        ("100%", [8, 8, 8], 240),
        ("3 slots", [3, 3, 3], 90),
        ("9 slots", [8, 8, 8], 240),
        ("240", [8, 8, 8], 240),
        ("999999", [8, 8, 8], 240),
        ("60", [2, 2, 2], 60),
        ("69", [2, 2, 2], 69),
        # 110 bytes are 11 experts: 3 each, and the two left over go to the first layers.
        ("110", [4, 4, 3], 110),
    ],
)
def test_by_hand(native, budget, slots, n_bytes):
    assert divide(native, budget, [(10, 8, 2)] * 3) == (0, slots, n_bytes)


def test_layers_of_different_sizes(native):
    # Layers with 4 experts of 10 and of 30 bytes, 1 used. Of 100 bytes, one slot each takes 40, a second each
    # 80, and the remaining 20 hold two more small experts.
    assert divide(native, "100", [(10, 4, 1), (30, 4, 1)])[1] == [4, 2]


def test_auto_takes_what_is_free(native):
    layers = [(MIB, 16, 4)] * 2
    assert divide(native, "auto", layers, 12 * MIB) == (0, [6, 6], 12 * MIB)
    assert divide(native, "auto", layers, 1000 * MIB) == (0, [16, 16], 32 * MIB)


def test_below_the_minimum_names_it(native):
    status, _, least = divide(native, "7MiB", [(MIB, 16, 4)] * 2)
    assert (status, least) == (ERR_BUDGET, 8 * MIB)
    assert "budget 7MiB is 7.0 MiB" in native.last_error()
    assert "raise the budget to 8 MiB" in native.last_error()


def test_properties_over_random_layers(native):
    rng = np.random.default_rng(5)
    for _ in range(300):
        n_layers = int(rng.integers(1, 12))
        layers = []
        for _ in range(n_layers):
            n_expert = int(rng.integers(1, 40))
            layers.append((int(rng.integers(1, 1000)), n_expert, int(rng.integers(1, n_expert + 1))))
        least = sum(size * used for size, _, used in layers)
        everything = sum(size * n_expert for size, n_expert, _ in layers)
        wanted = int(rng.integers(max(1, least // 2), everything + 10))
        status, slots, n_bytes = divide(native, str(wanted), layers)
        if min(wanted, everything) < least:
            assert status == ERR_BUDGET
            continue
        assert status == 0
        assert n_bytes == min(wanted, everything)
        used = sum(size * n for (size, _, _), n in zip(layers, slots, strict=True))
        assert used <= n_bytes
        for (size, n_expert, n_used), n in zip(layers, slots, strict=True):
            assert n_used <= n <= n_expert
            assert n == n_expert or used + size > n_bytes, "a slot more would have fitted"


ACCEPTED = [
    "auto", "min", "25%", "12.5%", "8GiB", "512MiB", "8G", "7KB", "1000000", "16 slots", "1 slot",
    "0.25", ".5", "1.0", ".5KiB", "0.5%", "1.5b", " 16.0\tSLOTS ", "99999999999999999", "0.07",
]  # fmt: skip
REFUSED = [
    "", "lots", "-1", "101%", "1.5 slots", "8 GiBs", "8QB", "nan", "inf", "0x10", "1.5", "1.2.3", ".", "%",
    "0.5b", "0.0001KiB", "1e400", "1e9", "1e-3%", "1 000", "a uto", "1 0%", "1000000000000000000",
    "1000000TiB", "3000000000 slots", "9" * 400, "9" * 400 + "%", "9" * 400 + " slots", "8\u212a",
    "8\u00a0GiB", "\u0663",
]  # fmt: skip
OFF = ["0", "0%", "0.0", ".0", "0.00%", "0 slots", "0GiB", "off", "none"]


@pytest.mark.parametrize("text", ACCEPTED)
def test_both_readers_accept(native, text):
    for size, least in ((1, 0), (1 << 20, ERR_BUDGET)):  # of one byte, and of many
        layers = [(size, 1 << 20, 1)]
        ours = divide(native, text, layers, 5)
        assert ours[0] in (0, least), native.last_error()
        assert divide(native, Budget.parse(text).text, layers, 5) == ours


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_both_readers_refuse(native, text):
    assert divide(native, text, [(1, 8, 1)])[0] == ERR_ARG
    with pytest.raises(RotaryError):
        Budget.parse(text)


@pytest.mark.parametrize("text", OFF)
def test_both_readers_turn_it_off(native, text):
    # A pool that is off has nothing to divide; the text is not at fault, and the message differs.
    assert divide(native, text, [(1, 8, 1)])[0] == ERR_ARG
    assert "not understood" not in native.last_error()
    assert RotaryConfig.from_any(text) is None


@pytest.mark.parametrize("share", [0.25, 1.0, 0.07, 1 / 3, 0.001])
def test_a_float_and_its_text_are_the_same_share(native, share):
    layers = [(MIB, 1000, 1)]
    wanted = divide(native, Budget.parse(share).text, layers)
    assert wanted[0] == 0 and wanted[2] == pytest.approx(share * 1000 * MIB, rel=1e-9)
    for text in (Budget.parse(f"{share:.12f}").text, f"{share:.12f}"):
        assert divide(native, text, layers)[:2] == wanted[:2]


def _divided_with_a_decimal_comma():
    import locale

    native = _native.load()
    before = divide(native, "12.5%", [(1, 1000, 1)])
    locale.setlocale(locale.LC_ALL, "xx")
    assert locale.localeconv()["decimal_point"] == ","
    return before, divide(native, "12.5%", [(1, 1000, 1)])


def test_numbers_have_a_point_in_every_language(native, tmp_path):
    # Graphical programs set the user's locale, whose numbers may have a decimal comma.
    localedef = shutil.which("localedef")
    made = localedef and subprocess.run(
        [localedef, "--no-archive", "-i", "de_DE", "-f", "UTF-8", tmp_path / "xx"], capture_output=True
    )
    if not made or not (tmp_path / "xx" / "LC_NUMERIC").exists():
        pytest.skip("localedef cannot make a language here")
    before, after = apart(_divided_with_a_decimal_comma, environment={"LOCPATH": str(tmp_path)})
    assert before == after == (0, [125], 125)
