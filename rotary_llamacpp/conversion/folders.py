# SPDX-License-Identifier: MIT
"""Converts a Hugging Face folder to GGUF with the program in the pinned llama.cpp source.

The program knows the architectures; nothing of it is repeated here. Wheels do not contain it, so the source
is needed: ROTARY_LLAMA_CPP_DIR, or build/sdist of a checkout, where ``make setup`` unpacks it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import pinned
from ..errors import ModelError, RotaryError
from ..host.children import child
from .journal import size

_SCRIPT = "convert_hf_to_gguf.py"
_MODULES = ("torch", "transformers", "safetensors", "sentencepiece", "gguf", "numpy")
_REQUIREMENTS = Path("requirements") / "requirements-convert_hf_to_gguf.txt"
_LOOK_S = 0.2  # between two looks at the progress


def files_of(folder: Path) -> list[Path]:
    """List the files of a Hugging Face folder, without those that conversions made.

    Raises
    ------
    ModelError
        The folder has no model.
    """
    found = sorted(path for path in folder.iterdir() if path.is_file())
    n_weights = sum(path.suffix == ".safetensors" for path in found)
    config = folder / "config.json" in found
    if not n_weights or not config:
        raise ModelError(
            f"{folder}: {n_weights} safetensors files and {'a' if config else 'no'} config.json; "
            "a Hugging Face model has both; give a folder with both, or a GGUF file"
        )
    return [path for path in found if not path.name.endswith((".gguf", ".part", ".part.json"))]


def converter() -> Path:
    """Path of the converter in the pinned source, after checking that it can be run.

    Raises
    ------
    RotaryError
        The source or an import is missing; the message says what to install.
    """
    sdist = Path(__file__).resolve().parents[2] / "build" / "sdist"
    unpacked = sdist / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    source = Path(os.environ.get("ROTARY_LLAMA_CPP_DIR", unpacked))
    if not (source / _SCRIPT).is_file():
        raise RotaryError(
            f"{source / _SCRIPT}: missing; safetensors are read by this converter in llama.cpp's source; "
            f"run `make setup` in a checkout, or set ROTARY_LLAMA_CPP_DIR to vendor/llama.cpp of the "
            f"llama-cpp-python {pinned.LLAMA_CPP_PYTHON} sdist"
        )
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise RotaryError(
            f"{_SCRIPT}: {', '.join(missing)} cannot be imported; run "
            f"`pip install -r {source / _REQUIREMENTS}`"
        )
    return source / _SCRIPT


def to_gguf(folder: Path, target: Path, progress: Callable[[int], object]) -> None:
    """Write the model of a folder to one GGUF file, in the 16-bit float type that it has.

    `progress` gets the bytes written since the last call.

    Raises
    ------
    ModelError
        The converter does not know the model, or failed.
    RotaryError
        The converter cannot run.
    """
    script = converter()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with child(
            str(script), str(folder), "--outfile", str(target), "--outtype", "auto",
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            seen = 0
            while process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_S)
                written = size(target)
                progress(written - seen)
                seen = written
        if process.returncode != 0 or not target.is_file():
            log.seek(0)
            said = [line.strip() for line in log if line.strip()] or [f"exit status {process.returncode}"]
            raise ModelError(
                f"{folder}: {_SCRIPT} failed, {said[-1]}; run it by hand to see all of its output: {script}"
            )
