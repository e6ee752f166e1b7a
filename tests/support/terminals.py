# SPDX-License-Identifier: MIT
"""A pseudo-terminal for tests, whose output a thread reads at once: programs never wait for the test."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
import threading

from tests.support import HANG_S

END = "[all of it]"


class Terminal(contextlib.ExitStack):
    """A pseudo-terminal, closed at the end of the ``with`` block.

    `text` is all its output so far, `theirs` the descriptor to write to.
    """

    def __init__(self, n_lines: int = 30, n_columns: int = 80) -> None:
        super().__init__()
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", n_lines, n_columns, 0, 0))
        self.before = termios.tcgetattr(self.theirs)
        self.text = ""
        self._more = threading.Condition()
        self._over, self._end = os.pipe()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.callback(self._close)

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while self._over not in select.select([self._ours, self._over], [], [])[0]:
            come = decoder.decode(os.read(self._ours, 1 << 16))
            with self._more:
                self.text += come
                self._more.notify_all()

    def _close(self) -> None:
        os.close(self._end)
        self._reader.join()
        for fd in (self._over, self.theirs, self._ours):
            os.close(fd)

    def wait_for(self, pattern: str, start: int = 0) -> int:
        """Wait for the first match at or after `start`; returns the position of its end."""
        found = re.compile(pattern)
        with self._more:
            came = self._more.wait_for(lambda: found.search(self.text, start), HANG_S)
        assert came, (pattern, self.text[-2000:])
        return came.end()

    def flush(self) -> None:
        """Wait until all output so far has been read."""
        os.write(self.theirs, END.encode())
        self.wait_for(re.escape(END))
        with self._more:
            self.text = self.text.replace(END, "")
