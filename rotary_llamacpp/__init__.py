# SPDX-License-Identifier: MIT
"""Pages Mixture-of-Experts weights under stock llama-cpp-python.

Importing this package loads neither the native library nor llama_cpp; using ``Llama`` or ``activate`` does.
Messages go to the logger ``rotary_llamacpp``.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RotaryConfig
    from .errors import (
        BudgetError,
        DeviceError,
        LibraryError,
        ModelError,
        ReadError,
        RotaryError,
        VersionError,
    )
    from .gguf_files.info import ModelInfo
    from .runtime.activation import activate, deactivate
    from .runtime.llama import Llama
    from .runtime.options import LlamaOptions
    from .runtime.stats import LayerStats, RotaryStats

    __version__: str

logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "Llama": "runtime.llama", "RotaryConfig": "config", "ModelInfo": "gguf_files.info",
    "activate": "runtime.activation", "deactivate": "runtime.activation",
    "LlamaOptions": "runtime.options", "RotaryStats": "runtime.stats", "LayerStats": "runtime.stats",
    "RotaryError": "errors", "BudgetError": "errors", "DeviceError": "errors", "LibraryError": "errors",
    "ModelError": "errors", "ReadError": "errors", "VersionError": "errors",
}  # fmt: skip
__all__ = [
    "BudgetError", "DeviceError", "LayerStats", "LibraryError", "Llama", "LlamaOptions", "ModelError",
    "ModelInfo", "ReadError", "RotaryConfig", "RotaryError", "RotaryStats", "VersionError", "__version__",
    "activate", "deactivate",
]  # fmt: skip


if not TYPE_CHECKING:  # else any name would pass for one of the package

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("rotary-llamacpp")
        if name in _HOMES:
            return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
