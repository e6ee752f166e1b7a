# SPDX-License-Identifier: MIT
"""A pytest plugin for llama-cpp-python's own tests: ``llama_cpp.Llama`` is ours, and the Hub is on this disk.

The environment says what to do: DROP_IN, the ``rotary`` argument of each model, or "stock"; DROP_IN_MODELS, a
JSON object of names on the Hub and the files that stand for them; DROP_IN_OUT, where the outcome of each test
and the figures of the models are written. A test that asks for another file is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import llama_cpp
import pytest

_outcomes: dict[str, str] = {}
_models: list[Any] = []
_files = json.loads(os.environ["DROP_IN_MODELS"])


def _download(repo_id: str, filename: str, **_: Any) -> str:
    if filename not in _files:
        pytest.skip(f"asks the Hub for {filename}")
    return _files[filename]


def pytest_configure() -> None:
    huggingface_hub.hf_hub_download = _download
    if importlib.util.find_spec("scipy") is None:  # imported by their tests, and used by none
        special = types.ModuleType("scipy.special")
        special.log_softmax = None  # type: ignore[attr-defined]
        sys.modules.update({"scipy": types.ModuleType("scipy"), "scipy.special": special})
    if (rotary := os.environ["DROP_IN"]) == "stock":
        return
    from rotary_llamacpp import Llama

    class DropIn(Llama):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"rotary": rotary, **kwargs})
            _models.append(self)

    llama_cpp.Llama = DropIn


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("/")[2]
    if report.when == "call" or not report.passed:
        _outcomes.setdefault(name, "passed")
    if report.failed:
        _outcomes[name] = f"failed: {report.longreprtext[-2000:]}"
    elif report.skipped:
        _outcomes[name] = str(report.longrepr[2]).removeprefix("Skipped: ")


def pytest_sessionfinish() -> None:
    stats = [llama.rotary_stats().to_dict() for llama in _models]
    Path(os.environ["DROP_IN_OUT"]).write_text(json.dumps({"outcomes": _outcomes, "stats": stats}))
