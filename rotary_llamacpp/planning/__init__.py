# SPDX-License-Identifier: MIT
"""Predicts memory and speed of a model that may not be loaded, for ``rotary plan``."""
