# SPDX-License-Identifier: MIT
"""Sizes in bytes, read from what people write."""

from __future__ import annotations

import re
from collections.abc import Callable

from .errors import RotaryError

MIB = 1024 * 1024

UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS[_letter] = UNITS[_letter + "ib"] = 1024**_power
    UNITS[_letter + "b"] = 1000**_power
# ASCII alone: the Kelvin sign in small letters is a k, and the library does not read other scripts' digits.
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|slots?|[kmgt]?i?b?)", re.ASCII)
_LIMIT_BYTES = 1e18  # of any size, as in the native library


def parse_bytes(value: int | str) -> int:
    """Bytes in a size: an integer, or text such as ``"512MiB"``, ``"8G"`` or ``"1000000"``."""
    number, unit = number_and_unit(value)
    if number and unit == "" and "." in number:
        raise RotaryError(
            f"size {shown(value)}: has no unit; bytes have no fractions; write {shown(number, str)}GiB"
        )
    n_bytes = whole_bytes(number, unit) if unit in UNITS else None
    if n_bytes is None:
        raise RotaryError(
            f"size {shown(value)}: not a number of bytes; units are KiB, MiB, GiB, TiB, KB, MB, GB, TB; "
            "write for example 512MiB"
        )
    return n_bytes


def parse_size(value: str) -> int:
    """The same of what a person says; a bare small number is refused, for it was meant in a unit."""
    n_bytes = parse_bytes(value)
    if value.strip().isdigit() and 0 < n_bytes < MIB:
        raise RotaryError(f"size {value!r}: is {n_bytes} bytes; a size has a unit; write {n_bytes}GiB")
    return n_bytes


def parse_shares(text: str) -> list[float]:
    """ "5,12.5" as shares of 1.

    Raises
    ------
    RotaryError
        Not numbers, or not above 0 and up to 100.
    """
    try:
        found = [float(each.strip().removesuffix("%")) / 100 for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise RotaryError(f"budgets {text!r}: not percentages; above 0, up to 100; such as 12.5,25")
    return found


def number_and_unit(value: object) -> tuple[str, str]:
    """A number as its digits, and its unit in small letters; neither if it is no such text."""
    try:
        text = str(value).strip()
    except ValueError:  # an int of more digits than Python writes
        return "", "-"
    match = _AMOUNT.fullmatch(text.lower()) if text.isascii() else None
    return (match[1], match[2]) if match is not None else ("", "-")


def whole_bytes(number: str, unit: str) -> int | None:
    """None for a part of a byte, and for more than any machine has."""
    n_bytes = float(number or "nan") * UNITS[unit]
    if not n_bytes < _LIMIT_BYTES or 0 < n_bytes < 1:
        return None
    # As an integer if it is one: a float would round large ones.
    return int(n_bytes) if "." in number else int(number.lstrip("0") or "0") * UNITS[unit]


def shown(value: object, form: Callable[[object], str] = repr) -> str:
    """A value for a message, in one line, and not for pages."""
    try:
        text = form(value)
    except ValueError:
        text = "of too many digits"
    return text if len(text) <= 80 else text[:77] + "..."
