# SPDX-License-Identifier: MIT
"""Routing traces and profiles: which experts each layer chose for each token.

`Trace` documents the arrays, `load` reads an archive or a CSV file. Module `profiles` keeps what
a model's layers choose most often.
"""

from .archive import DECODE, PREFILL, Trace, load

__all__ = ["DECODE", "PREFILL", "Trace", "load"]
