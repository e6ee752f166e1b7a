# SPDX-License-Identifier: MIT
"""Sizes, rates and shares: parsed from what people write, and formatted for people to read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .errors import RotaryError

MIB = 1 << 20
GIB = 1 << 30

UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS[_letter] = UNITS[_letter + "ib"] = 1024**_power
    UNITS[_letter + "b"] = 1000**_power
# ASCII only: the Kelvin sign lowers to k, and the native library does not read digits of other scripts.
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|slots?|[kmgt]?i?b?)", re.ASCII)
_MAX_BYTES = 1e18  # of any size, as in the native library
_LINKS = {"pcie3x16": 12.5e9, "pcie4x8": 12.5e9, "pcie4x16": 25e9, "pcie5x16": 52e9}  # as published
_RATE = re.compile(r"(.+?)\s*([KMG]i?B)/s")


# ---- reading


def parse_bytes(value: int | str) -> int:
    """Parse a size into bytes: an integer, or text such as ``"512MiB"``, ``"8G"`` or ``"1000000"``."""
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
    """Parse a size that a person wrote into bytes; a small number without a unit is refused."""
    n_bytes = parse_bytes(value)
    if value.strip().isdigit() and 0 < n_bytes < MIB:
        raise RotaryError(f"size {value!r}: is only {n_bytes} bytes; a size needs a unit; write {n_bytes}GiB")
    return n_bytes


def parse_rate(text: str) -> float:
    """Parse a rate such as "25GB/s", "500MiB/s" or "pcie4x16" into bytes per microsecond.

    Raises
    ------
    RotaryError
        The text is not such a rate.
    """
    if text in _LINKS:
        return _LINKS[text] / 1e6
    if match := _RATE.fullmatch(text):
        try:
            rate = float(match[1]) * UNITS[match[2].lower()] / 1e6
        except ValueError:
            rate = 0.0
        if 0 < rate < 1e9:
            return rate
    raise RotaryError(
        f"link {text!r}: not a rate; write for example 25GB/s, 500MiB/s, or {', '.join(_LINKS)}"
    )


def parse_shares(text: str) -> list[float]:
    """Parse percentages separated by commas, such as "5,12.5", into shares of 1.

    Raises
    ------
    RotaryError
        A percentage is not a number, or not above 0 and up to 100.
    """
    try:
        found = [float(each.strip().removesuffix("%")) / 100 for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise RotaryError(
            f"budgets {text!r}: not percentages above 0 and up to 100; write for example 12.5,25"
        )
    return found


def number_and_unit(value: object) -> tuple[str, str]:
    """Split text such as "8 GiB" into digits and a unit in lower case; "" and "-" for any other text."""
    try:
        text = str(value).strip()
    except ValueError:  # an int with more digits than Python converts
        return "", "-"
    match = _AMOUNT.fullmatch(text.lower()) if text.isascii() else None
    return (match[1], match[2]) if match is not None else ("", "-")


def whole_bytes(number: str, unit: str) -> int | None:
    """Bytes of a number and a unit; None for less than a byte, and for more than any machine has."""
    n_bytes = float(number or "nan") * UNITS[unit]
    if not n_bytes < _MAX_BYTES or 0 < n_bytes < 1:
        return None
    # Integers stay integers, because a float would round large ones.
    return int(n_bytes) if "." in number else int(number.lstrip("0") or "0") * UNITS[unit]


# ---- showing


def shown(value: object, form: Callable[[object], str] = repr) -> str:
    """A value for a message, on one line of at most 80 characters."""
    try:
        text = form(value)
    except ValueError:
        text = "of too many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def mib(n_bytes: float, digits: int = 1) -> str:
    """Bytes as text in MiB, the unit of all messages."""
    return f"{n_bytes / MIB:.{digits}f} MiB"


def size(n_bytes: float) -> str:
    """Bytes as text, in GiB from 1 GiB on; for tables, in which sizes differ a lot."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB else mib(n_bytes)


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as text; "-" if there is none."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def decimal(value: float | None) -> str:
    """A number as text with one decimal; "-" if there is none."""
    return "-" if value is None else f"{value:.1f}"


def clock(seconds: float) -> str:
    """Seconds as text in minutes and seconds, such as "1:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def span(numbers: Sequence[int]) -> str:
    """The smallest and the largest number as text: "8", or "8 to 16"."""
    first, last = min(numbers, default=0), max(numbers, default=0)
    return f"{first}" if first == last else f"{first} to {last}"


def ratio(part: float, whole: float) -> float | None:
    """A part divided by its whole; None, never 1, if the whole is 0."""
    return part / whole if whole else None
