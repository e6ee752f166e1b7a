# SPDX-License-Identifier: MIT
"""Ctrl-C where KeyboardInterrupt will not do: while modules are imported, and while llama.cpp calls back.

Imports little itself: it is there before all others. Only the main thread can say what signals do; in others
nothing changes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


def exiting() -> contextlib.AbstractContextManager[None]:
    """Ctrl-C ends the process at once, as the status 130 says. For imports, before anything is written.

    An exception there is lost in callbacks of the import system, or becomes an ImportError of a package that
    cannot go on.
    """
    return _handled(lambda *_: os._exit(130))


@contextlib.contextmanager
def noted(event: threading.Event, *, and_raised: bool) -> Iterator[None]:
    """Ctrl-C sets `event`; raised in a destructor or a C callback alone, KeyboardInterrupt would be lost.

    Parameters
    ----------
    and_raised : bool
        It is raised as well; else only from the second time on, for who cannot wait.
    """

    def on_interrupt(*_: object) -> None:
        again = event.is_set()
        event.set()
        if and_raised or again:
            raise KeyboardInterrupt

    with _handled(on_interrupt):
        yield


@contextlib.contextmanager
def _handled(handler: _Handler) -> Iterator[None]:
    in_main = threading.current_thread() is threading.main_thread()
    # Where interrupts are ignored, as in a shell's background, they stay so.
    if not in_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
