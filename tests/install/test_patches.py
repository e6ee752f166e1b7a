# SPDX-License-Identifier: MIT
"""Every patch has a complete header, applies exactly to the pinned source, and does what it claims."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from rotary_llamacpp.pinned import LLAMA_CPP_PYTHON
from tests.support import HANG_S, ROOT

PATCHES = sorted((ROOT / "patches").glob("*.patch"))
DEVICES_PATCH = ROOT / "patches" / "llama-cpp-python-devices.patch"
SDIST = ROOT / "build" / "sdist" / f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
INSTALLED = Path(llama_cpp.__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-moe-q8_0.gguf"


def apply(patch: Path, root: Path) -> None:
    """Apply a unified diff (-p1) below `root`, without fuzz: context must be exactly at the stated lines."""
    lines = patch.read_text().split("\n---\n", 1)[1].splitlines()
    i = 0
    while i < len(lines):
        assert lines[i].startswith("--- "), f"{patch.name}: not a file header: {lines[i]}"
        name = lines[i + 1].removeprefix("+++ b/")
        old = [] if lines[i] == "--- /dev/null" else (root / name).read_text().split("\n")
        new: list[str] = []
        taken = 0
        i += 2
        while i < len(lines) and lines[i].startswith("@@ "):
            start, _, _, n_new = (
                int(n or 1) for n in re.match(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))?", lines[i]).groups()
            )
            first = max(start - 1, 0)
            new += old[taken:first]
            taken = first
            n_before = len(new)
            i += 1
            while i < len(lines) and lines[i][:1] in (" ", "-", "+") and not lines[i].startswith("--- "):
                sign, text = lines[i][0], lines[i][1:]
                if sign != "+":
                    assert old[taken] == text, (
                        f"{patch.name}: {name}:{taken + 1} is {old[taken]!r}, not {text!r}"
                    )
                    taken += 1
                if sign != "-":
                    new.append(text)
                i += 1
            assert len(new) - n_before == n_new, f"{patch.name}: {name}: hunk at {start} is cut short"
        (root / name).write_text("\n".join(new + old[taken:]) + ("" if old else "\n"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name)
def test_header(patch: Path) -> None:
    head = patch.read_text().split("\n---\n", 1)[0]
    fields = re.findall(r"^([A-Z][\w -]+): ", head, re.MULTILINE)
    assert fields == ["Description", "Upstream status", "Applies-to", "Without it"]
    assert f"llama-cpp-python {LLAMA_CPP_PYTHON}," in head


@pytest.mark.parametrize("source", [INSTALLED, SDIST], ids=["installed", "sdist"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name)
def test_applies(patch: Path, source: Path, tmp_path: Path) -> None:
    assert source.is_dir(), "run: make setup"
    copy_package(source, tmp_path)
    apply(patch, tmp_path)


def copy_package(source: Path, target: Path) -> None:
    ignore = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(source / "llama_cpp", target / "llama_cpp", ignore=ignore)


# ---- devices and tensor_buft_overrides -----------------------------------------------------------


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched llama_cpp and the installed libraries."""
    root = tmp_path_factory.mktemp("patched")
    copy_package(INSTALLED, root)
    apply(DEVICES_PATCH, root)
    (root / "llama_cpp" / "lib").symlink_to(INSTALLED / "llama_cpp" / "lib")
    return root


SCRIPT = """
import json, sys
import llama_cpp
model, backend, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if backend:
    import ctypes
    load = llama_cpp.llama_cpp._lib.ggml_backend_load
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    assert load(backend.encode())
try:
    llama = llama_cpp.Llama(model, n_ctx=256, n_threads=2, verbose=False, **kwargs)
except ValueError as err:
    print(json.dumps({"error": str(err)}))
else:
    state = llama.__getstate__()
    text = llama("In the beginning", max_tokens=16, temperature=0)["choices"][0]["text"]
    print(json.dumps({"text": text, "state": {key: state.get(key) for key in kwargs}}))
"""


def generate(package: Path, backend: str = "", **kwargs: object) -> tuple[dict, str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("ROTARY_", "LLAMA_CPP_"))
    }
    environment |= {"PYTHONPATH": str(package), "ROTARY_BUDGET": "25%", "ROTARY_STATS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(MODEL), backend, json.dumps(kwargs)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout), result.stderr


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"devices": ["CPU", "GPU9"]}, "devices: no device named 'GPU9'; there are CPU"),
        (
            {"tensor_buft_overrides": {"exps": "GPU9"}},
            "tensor_buft_overrides: no buffer type named 'GPU9'; there are CPU",
        ),
    ],
)
@pytest.mark.model
def test_unknown_name(patched: Path, kwargs: dict, message: str) -> None:
    answer, _ = generate(patched, **kwargs)
    assert answer["error"].startswith(message)


@pytest.mark.model
def test_same_text(patched: Path) -> None:
    stock, _ = generate(INSTALLED)
    kwargs = {"devices": ["CPU"], "tensor_buft_overrides": {r"ffn_.*_exps": "CPU"}}
    answer, _ = generate(patched, **kwargs)
    assert answer["text"] == stock["text"] != ""
    assert answer["state"] == kwargs  # pickling saves them


@pytest.mark.model
def test_rotary_device_by_name(native: Any, patched: Path) -> None:
    stock, _ = generate(INSTALLED)
    answer, stderr = generate(patched, backend=str(native.path), devices=["ROTARY0"], n_gpu_layers=-1)
    assert answer["text"] == stock["text"]
    assert re.search(r"^rotary: .*\bmisses=[1-9]", stderr, re.MULTILINE)
