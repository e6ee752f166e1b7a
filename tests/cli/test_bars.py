# SPDX-License-Identifier: MIT
"""Bars of progress on a terminal that is gone."""

from __future__ import annotations

import errno
import sys

import pytest

from rotary_llamacpp.bars import bars


class Gone:
    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.number = number

    def isatty(self) -> bool:
        return True

    def write(self, _: str) -> None:
        raise OSError(self.number, "cannot be written")

    def flush(self) -> None:
        raise OSError(self.number, "cannot be written")


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_terminal_that_is_gone_fails_nothing(monkeypatch, number):
    monkeypatch.setattr(sys, "stderr", Gone(number))
    with bars()("copy", 100) as progress:
        progress(50)
