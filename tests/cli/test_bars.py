# SPDX-License-Identifier: MIT
"""Progress bars on a terminal that disappears."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from rotary_llamacpp.display.bars import bars


class Screen(io.StringIO):
    """A terminal whose writes fail once `error` is set."""

    error: OSError | None = None
    n_lost = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.error:
            self.n_lost += 1
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_terminal_that_is_gone_fails_nothing(monkeypatch, number):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with bars()("copy", 100) as progress:
        progress(50)
    assert "copy" in screen.getvalue() and screen.n_lost == 0, "where it is there, the bar is drawn"
    screen.error = OSError(number, "cannot be written")
    with bars()("copy", 100) as progress:
        progress(50)
    assert screen.n_lost > 0, "what is drawn is lost"


def test_no_bar_where_none_is_wanted(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with bars(off=True)("copy", 100) as progress:
        progress(50)
    monkeypatch.setattr(screen, "isatty", lambda: False)
    with bars()("copy", 100) as progress:
        progress(50)
    assert screen.getvalue() == ""
