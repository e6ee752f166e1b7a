# SPDX-License-Identifier: MIT
"""Upstream's own programs on ROTARY0 (make conformance)."""
