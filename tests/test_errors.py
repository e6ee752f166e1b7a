# SPDX-License-Identifier: MIT
"""The error types: one root, and what stock's callers already catch."""

from __future__ import annotations

import inspect

from rotary_llamacpp import errors


def test_one_root():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(kinds) == 7
    assert all(issubclass(kind, errors.RotaryError) for kind in kinds)


def test_stock_callers_keep_catching():
    assert issubclass(errors.ModelError, ValueError), "stock raises ValueError for a model it cannot load"
    assert issubclass(errors.BudgetError, ValueError)
    assert issubclass(errors.ReadError, RuntimeError), "stock raises RuntimeError where decoding fails"
    assert issubclass(errors.VersionError, errors.LibraryError)
