# SPDX-License-Identifier: MIT
"""Tests on a CUDA device (benchmarks/gpu.py runs them)."""
