# SPDX-License-Identifier: MIT
"""What several tests of conversions use."""

from __future__ import annotations

import pytest

from rotary_llamacpp.conversion import copying
from tests.support.conversions import MIB


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies a MiB at a time, and notes each 2 MiB."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(copying, "_NOTE_BYTES", 2 * MIB)
