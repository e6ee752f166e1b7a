# SPDX-License-Identifier: MIT
"""A machine with a CUDA device (benchmarks/gpu.py runs these)."""
