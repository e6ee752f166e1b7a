# SPDX-License-Identifier: MIT
"""Every error this package raises on purpose.

A message is one line. It reads ``<object>: <what failed, with values>; <limit and unit>; <what to do>``,
where the second part is left out if there is no limit. The children also derive from the built-in that stock
llama-cpp-python raises in the same place, so that code written for stock keeps catching them.
"""


class RotaryError(Exception):
    """Root of the package's errors."""

    def __str__(self) -> str:
        # File names, metadata and input may contain line breaks and escape sequences.
        text = super().__str__()
        return text if text.isprintable() else "".join(map(_printable, text))


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


class ModelError(RotaryError, ValueError):
    """The model file is missing, damaged or not a GGUF."""


class BudgetError(RotaryError, ValueError):
    """The budget is not understood, or is below what one token needs."""


class DeviceError(RotaryError, ValueError):
    """The inner device does not exist, or cannot be used now."""


class LibraryError(RotaryError, RuntimeError):
    """The native library is missing, damaged or built for another machine, or it failed."""


class ReadError(RotaryError, RuntimeError):
    """The model's file cannot be read while the model runs, or is no longer the file that was loaded."""


class VersionError(LibraryError):
    """The versions of llama-cpp-python, ggml and the native library do not match."""
