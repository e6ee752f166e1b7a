# SPDX-License-Identifier: MIT
"""The error types: one root, and what stock's callers already catch."""

from __future__ import annotations

import inspect
import pickle

from rotary_llamacpp import errors


def test_one_root():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(kinds) == 7
    assert all(issubclass(kind, errors.RotaryError) for kind in kinds)


def test_messages_are_one_line():
    # Whatever a file's name, a header's text or a user's word has in it.
    error = errors.ModelError("a\nb\x1b[31m\u2028\x85: tab\there, caf\u00e9; limit; advice")
    assert str(error) == "a\\nb\\x1b[31m\\u2028\\x85: tab\\there, caf\u00e9; limit; advice"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_stock_callers_keep_catching():
    assert issubclass(errors.ModelError, ValueError), "stock raises ValueError for a model it cannot load"
    assert issubclass(errors.BudgetError, ValueError)
    assert issubclass(errors.ReadError, RuntimeError), "stock raises RuntimeError where decoding fails"
    assert issubclass(errors.VersionError, errors.LibraryError)
