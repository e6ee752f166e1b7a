# SPDX-License-Identifier: MIT
"""Tests, in folders by what they need to run."""
