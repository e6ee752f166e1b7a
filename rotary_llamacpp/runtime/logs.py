# SPDX-License-Identifier: MIT
"""The logger ``rotary_llamacpp``: silent by itself, and shown on standard error as ``verbose`` says.

Importing the package adds only a NullHandler. With ``Llama`` or ``activate`` comes a handler that writes to
standard error where the application has configured no logging: warnings, and if ``verbose`` is true what was
chosen, beside llama.cpp's own log. An application's handlers, and its level for this logger, are left alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys

logger = logging.getLogger("rotary_llamacpp")


class _StderrHandler(logging.Handler):
    """Writes messages to standard error unless a handler of the application gets them."""

    def emit(self, record: logging.LogRecord) -> None:
        handlers = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]
        theirs = [each for each in handlers if not isinstance(each, (logging.NullHandler, _StderrHandler))]
        if not theirs and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or full
                sys.stderr.write(self.format(record) + "\n")


logger.addHandler(_StderrHandler())


def level_for(verbose: bool) -> int:
    """Return the level of a model's messages that are not warnings; if verbose, let the logger pass it on."""
    if not verbose:
        return logging.DEBUG
    if logger.level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    return logging.INFO
