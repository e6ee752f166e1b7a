# SPDX-License-Identifier: MIT
"""Messages of `make machines` where it cannot run. No machine is run here, as that takes minutes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def refused(tmp_path: Path, *names: str) -> str:
    """The only line that it prints where no program is found."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.machines.run", str(tmp_path), *names],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_says_all_that_is_missing(tmp_path):
    line = refused(tmp_path)
    assert "qemu-x86_64" in line and "qemu-aarch64" in line
    assert re.search(r"apt-get install .*g\+\+-\S+-linux-gnu.* qemu-user\)$", line)


@pytest.mark.parametrize("name", ["Haswell", "Graviton-3"])
def test_says_what_one_machine_wants(tmp_path, name):
    arch = {"Haswell": "x86_64", "Graviton-3": "aarch64"}
    line = refused(tmp_path, name)
    assert [each for each in arch if f"qemu-{arch[each]}" in line] == [name]


def test_unknown_machine(tmp_path):
    line = refused(tmp_path, "i486")
    assert line.startswith("machines: i486: no such machine; ") and "Haswell" in line
