# SPDX-License-Identifier: MIT
"""Fixtures for tests of conversions."""

from __future__ import annotations

import pytest

from rotary_llamacpp.conversion import copying
from tests.support.conversions import MIB


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy 1 MiB at a time, and note progress in the journal every 2 MiB."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(copying, "_NOTE_BYTES", 2 * MIB)
