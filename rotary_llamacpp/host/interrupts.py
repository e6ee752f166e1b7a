# SPDX-License-Identifier: MIT
"""Handles Ctrl-C where KeyboardInterrupt will not do: during imports, and in callbacks from llama.cpp.

Imports little, because it is imported first. Only the main thread can set signal handlers; in other
threads these functions change nothing.
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
    """Let Ctrl-C end the process at once with status 130. For imports, before anything is written.

    During imports, an exception is lost in callbacks of the import system, or becomes an ImportError of a
    package that cannot go on.
    """
    return _handled(lambda *_: os._exit(130))


@contextlib.contextmanager
def noted(event: threading.Event, *, and_raised: bool) -> Iterator[None]:
    """Let Ctrl-C set `event`, because a KeyboardInterrupt in a destructor or a C callback is lost.

    Parameters
    ----------
    and_raised : bool
        Raise KeyboardInterrupt as well; otherwise only a second Ctrl-C raises it.
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
    # Interrupts that are ignored, as in the background of a shell, stay ignored.
    if not in_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
