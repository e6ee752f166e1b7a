# SPDX-License-Identifier: MIT
"""Runs Python programs in child processes that end when this process ends, however it ends.

A child starts as this module, and asks the kernel to kill it when its parent ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def child(program: str, *arguments: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module by name, or a script by path; kill it if the block is left before it has ended."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), program, *arguments],
        # Only the parent gets Ctrl-C, and ends the child.
        start_new_session=True,
        # ggml's backtrace of a failed assertion forks, and hangs with several threads.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GGML_NO_BACKTRACE": "1"},
        **streams,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    parent_, program_, *sys.argv[1:] = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent_):
        sys.exit("the parent process has ended")
    if program_.endswith(".py"):
        sys.argv[0], sys.path[0] = program_, str(Path(program_).parent)
        runpy.run_path(program_, run_name="__main__")
    else:
        runpy.run_module(program_, run_name="__main__", alter_sys=True)
