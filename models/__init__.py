# SPDX-License-Identifier: MIT
"""Models for tests and benchmarks: see README.md. Not part of the installed package."""
