# SPDX-License-Identifier: MIT
"""Replays routing traces on the library's own slot tables: hit rates, the optimum, and a model of time."""

from .replays import Link, Outcome, belady, misses_of, predictor, replay, slots_for

__all__ = ["Link", "Outcome", "belady", "misses_of", "predictor", "replay", "slots_for"]
