# SPDX-License-Identifier: MIT
"""Shared by the benchmarks: measuring in a process of its own, the processor's name, synthetic models."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rotary_llamacpp.pinned import LLAMA_CPP_PYTHON

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp import Llama
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "bench"


class ProcessFailed(Exception):
    """A measuring process ended with `returncode`, negative for a signal, and wrote `stderr`."""

    def __init__(self, returncode: int, stderr: str) -> None:
        super().__init__(f"status {returncode}: {stderr.strip()[-800:]}")
        self.returncode = returncode
        self.stderr = stderr


def in_process(
    module: str, function: str, *arguments: object, timeout: float | None = None, root: Path = ROOT
) -> dict:
    """Call `module`.`function` in a fresh interpreter, so that no run inherits another's memory or threads.

    The code is that of the checkout at `root`. Arguments and result are JSON, the result in the last line of
    standard output.

    Raises
    ------
    ProcessFailed
        The process did not end with status 0.
    subprocess.TimeoutExpired
        The process took longer than `timeout` seconds and was killed.
    """
    code = (
        f"import json, sys; from {module} import {function}; "
        f"print(json.dumps({function}(*json.loads(sys.argv[1])), default=str))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
        timeout=timeout,
    )  # fmt: skip
    if result.returncode != 0:
        raise ProcessFailed(result.returncode, result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def cpu_name() -> str:
    """The processor's name, from /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def provenance() -> dict:
    """Today's date, the commit of this checkout, None if unknown, and llama-cpp-python's version.

    A commit with changes that are not committed ends in "+".
    """

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    commit = git("rev-parse", "--short=10", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "+"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "commit": commit, "llama_cpp_python": LLAMA_CPP_PYTHON}


def synthetic(folder: Path, shape: str, type_: str, locality: float | None, **overrides: int) -> Path:
    """Path of a synthetic model in `folder`, generated unless it is there."""
    from models.synth import synthesize

    folder.mkdir(parents=True, exist_ok=True)
    changed = "".join(f"-{name}{value}" for name, value in overrides.items())
    path = folder / f"{shape}{changed}-{type_}-{locality or 'random'}.gguf"
    if not path.exists():
        synthesize(path, shape, type=type_, locality=locality, **overrides)
    return path


def last_logits(llama: Llama) -> NDArray[np.float32]:
    """View of the last token's logits, valid until the next token is computed.

    llama_cpp itself returns a list of Python numbers, which takes milliseconds for each token.
    """
    import llama_cpp
    import numpy as np

    found = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
    return np.ctypeslib.as_array(found, (llama.n_vocab(),))
