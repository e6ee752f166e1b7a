# SPDX-License-Identifier: MIT
"""Lays models out for direct reads, for ``rotary convert``."""
