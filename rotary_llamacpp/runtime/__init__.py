# SPDX-License-Identifier: MIT
"""Loads models with paged experts, runs them, and keeps their figures."""
