# SPDX-License-Identifier: MIT
"""The Python package alone, without running a model."""
