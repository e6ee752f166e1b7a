# SPDX-License-Identifier: MIT
"""Damaged input for everything that reads some (make fuzz)."""
