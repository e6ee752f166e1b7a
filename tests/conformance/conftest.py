# SPDX-License-Identifier: MIT
"""Skip the conformance tests unless upstream's programs are built."""

from __future__ import annotations

import pytest

from tests.conformance.test_conformance import LIBRARY, PROGRAMS
from tests.support import ROOT


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    for path in (LIBRARY, PROGRAMS / "test-backend-ops"):
        if not path.exists():
            pytest.skip(f"{path.relative_to(ROOT)} is not built; run: make conformance")
