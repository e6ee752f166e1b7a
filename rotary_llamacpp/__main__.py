# SPDX-License-Identifier: MIT
"""Where the command ``rotary`` begins, and ``python -m rotary_llamacpp``: before what can fail is imported.

Ctrl-C during imports ends the process without a word. A package that is missing, an output that is full or
closed end it with one line.
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
            f"{error.name or 'python'}: cannot be imported, {said}; rotary needs it; install it again with "
            "`pip install --force-reinstall rotary-llamacpp`"
        )
    except OSError as error:
        _end(
            f"{error.filename or 'output'}: {error.strerror or error}; all of it is wanted; try another place"
        )


def _write_any_text() -> None:
    """Have outputs take names that are no text, as their bytes, and letters that the terminal has not."""
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
    # What an output still holds is tried again when the interpreter ends, and would be complained of then.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(2)


if __name__ == "__main__":
    main()
