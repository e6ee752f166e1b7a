# SPDX-License-Identifier: MIT
"""Entry point of ``rotary`` and of ``python -m rotary_llamacpp``.

Imports little, so that it can report an import that fails. Ctrl-C during imports ends the process silently; a
missing package, or an output that is full or closed, ends it with a one-line message.
"""

from __future__ import annotations

import contextlib
import os
import sys

from .host.interrupts import exiting


def main() -> None:
    """Run the command."""
    _write_any_text()
    try:
        with exiting():
            from .cli import main as commands
        commands()
    except ImportError as error:
        said = " ".join(str(error).split())
        _end(
            f"{error.name or 'python'}: cannot be imported, {said}; reinstall it with "
            "`pip install --force-reinstall rotary-llamacpp`"
        )
    except OSError as error:
        _end(f"{error.filename or 'output'}: cannot be written, {error.strerror or error}; try another place")


def _write_any_text() -> None:
    """Make outputs accept file names that are not valid text, and characters that the terminal lacks."""
    import codecs

    def handle(error: UnicodeError) -> tuple[str | bytes, int]:
        try:
            return codecs.lookup_error("surrogateescape")(error)
        except UnicodeError:
            return codecs.backslashreplace_errors(error)

    codecs.register_error("rotary", handle)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="rotary")


def _end(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"rotary: {line}", file=sys.stderr)
    # At exit, the interpreter would try to flush the buffers again, and complain.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(2)


if __name__ == "__main__":
    main()
