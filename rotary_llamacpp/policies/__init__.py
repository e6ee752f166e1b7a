# SPDX-License-Identifier: MIT
"""Eviction policies: the native ones by name, and versions in Python to read and to base your own on.

A policy belongs to one layer. It sees every routing, which experts enter and leave, and picks the victim when
a slot is needed. `NATIVE` names the policies of the library (native/src/cache/policies); `REFERENCES` has a
class for each that behaves the same, request by request. Anything with the methods of `EvictionPolicy` can be
given as ``policy=`` instead of a name; it is called from the thread that computes, and Python makes it
slower.
"""

from .arc import Arc
from .lfu import Lfu
from .lru import Lru
from .policy import EvictionPolicy, Factory, Routing, Weights
from .recall import Recall
from .s3fifo import S3Fifo
from .sieve import Sieve
from .weighted import Weighted

AUTO = "auto"  # the best that can run where lookups are resolved: recall on the host, lfu on a device
REFERENCES: dict[str, Factory] = {
    "lru": Lru, "lfu": Lfu, "weighted": Weighted, "sieve": Sieve, "s3fifo": S3Fifo, "arc": Arc,
    "recall": Recall,
}  # fmt: skip
NATIVE = tuple(REFERENCES)

__all__ = [
    "AUTO", "NATIVE", "REFERENCES", "Arc", "EvictionPolicy", "Factory", "Lfu", "Lru", "Recall", "Routing",
    "S3Fifo", "Sieve", "Weighted", "Weights",
]  # fmt: skip
