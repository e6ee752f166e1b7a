# SPDX-License-Identifier: MIT
"""Tests by room: what they need to run is what parts them."""
