# SPDX-License-Identifier: MIT
"""Makes a GGUF of a Hugging Face folder with the converter of the pinned llama.cpp source, as a program.

That converter knows the architectures; nothing of it is repeated here. It is no part of a wheel, so that the
source must be there: ROTARY_LLAMA_CPP_DIR, or build/sdist of a checkout, where ``make setup`` unpacks it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import pinned
from .errors import ModelError, RotaryError

_SCRIPT = "convert_hf_to_gguf.py"
_MODULES = ("torch", "transformers", "safetensors", "sentencepiece", "gguf", "numpy")
_REQUIREMENTS = Path("requirements") / "requirements-convert_hf_to_gguf.txt"


def weights_of(folder: Path) -> list[Path]:
    """The folder's safetensors files.

    Raises
    ------
    ModelError
        It is no folder of a model.
    """
    found = sorted(folder.glob("*.safetensors"))
    config = (folder / "config.json").is_file()
    if not found or not config:
        raise ModelError(
            f"{folder}: {len(found)} safetensors files and {'a' if config else 'no'} config.json; "
            "a Hugging Face model has both; give its folder, or a GGUF file"
        )
    return found


def converter() -> Path:
    """The pinned source's converter, whose imports are there.

    Raises
    ------
    RotaryError
        There is no such source, or an import is missing; the message says what to install.
    """
    sdist = Path(__file__).resolve().parent.parent / "build" / "sdist"
    unpacked = sdist / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    source = Path(os.environ.get("ROTARY_LLAMA_CPP_DIR", unpacked))
    if not (source / _SCRIPT).is_file():
        raise RotaryError(
            f"{source / _SCRIPT}: not there; safetensors are read by the converter of llama.cpp's source; "
            f"run `make setup` in a checkout, or set ROTARY_LLAMA_CPP_DIR to vendor/llama.cpp of the "
            f"llama-cpp-python {pinned.LLAMA_CPP_PYTHON} sdist"
        )
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise RotaryError(
            f"{_SCRIPT}: {', '.join(missing)} cannot be imported; it needs them to read safetensors; run "
            f"`pip install -r {source / _REQUIREMENTS}`"
        )
    return source / _SCRIPT


def to_gguf(folder: Path, target: Path) -> None:
    """Write a folder's model to one GGUF file, in the 16-bit float that it has.

    Raises
    ------
    ModelError
        The converter does not know the model, or failed.
    RotaryError
        It cannot run.
    """
    script = converter()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", "auto"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status != 0 or not target.is_file():
            log.seek(0)
            said = [line.strip() for line in log if line.strip()] or [f"exit status {status}"]
            raise ModelError(
                f"{folder}: {_SCRIPT} failed, {said[-1]}; it converts what llama.cpp supports; "
                f"run it by hand for all it says: {script}"
            )
