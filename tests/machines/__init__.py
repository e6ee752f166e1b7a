# SPDX-License-Identifier: MIT
"""Emulated processors (make machines)."""
