# SPDX-License-Identifier: MIT
"""A small sample of `make fuzz`: the first damaged inputs of one seed are accepted or refused in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import ROOT

CASES = {
    "gguf": 60, "load": 200, "traces": 60, "profiles": 40, "journals": 20, "budgets": 300, "environment": 20,
}  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("name", CASES)
def test_sample(native, name):
    command = [sys.executable, "-m", "tests.fuzz.run", "--only", name, "--jobs", "1"]
    ran = subprocess.run(
        [*command, "--cases", str(CASES[name])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    assert " cases in " in ran.stdout
