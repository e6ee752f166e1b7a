# SPDX-License-Identifier: MIT
"""The error types: one root, and base classes that stock's callers already catch."""

from __future__ import annotations

import inspect
import pickle

from rotary_llamacpp import errors


def test_one_root():
    kinds = dict(inspect.getmembers(errors, inspect.isclass))
    assert all(kind.__module__ == errors.__name__ for kind in kinds.values()), "nothing of others'"
    assert [name for name, kind in kinds.items() if not issubclass(kind, kinds["RotaryError"])] == []
    assert kinds["RotaryError"].__mro__[1:] == (Exception, BaseException, object)
    # Code that catches the package's errors, or those that stock raises in the same place, catches them all.
    assert {name: kind.__bases__[-1] for name, kind in kinds.items() if name != "RotaryError"} == {
        "ModelError": ValueError,  # stock: a model that it cannot load
        "BudgetError": ValueError,
        "DeviceError": ValueError,
        "LibraryError": RuntimeError,
        "ReadError": RuntimeError,  # stock: decoding that fails
        "VersionError": errors.LibraryError,
    }


def test_messages_are_one_line():
    # Whatever characters file names, headers and users' values contain.
    error = errors.ModelError("a\nb\x1b[31m\u2028\x85: tab\there, caf\u00e9; limit; advice")
    assert str(error) == "a\\nb\\x1b[31m\\u2028\\x85: tab\\there, caf\u00e9; limit; advice"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
