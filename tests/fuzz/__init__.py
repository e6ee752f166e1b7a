# SPDX-License-Identifier: MIT
"""Damaged input for every reader (make fuzz)."""
