# SPDX-License-Identifier: MIT
"""Tests that hold README.md and docs/ against the code."""
