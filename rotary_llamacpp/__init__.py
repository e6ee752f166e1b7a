# SPDX-License-Identifier: MIT
"""Pages Mixture-of-Experts weights under stock llama-cpp-python.

Importing this package loads neither the native library nor llama_cpp; using ``Llama`` or ``activate`` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RotaryConfig
    from .errors import ReadError, RotaryError
    from .gguf_files.info import ModelInfo
    from .runtime.activation import activate, deactivate
    from .runtime.llama import Llama

    __version__: str

_HOMES = {
    "Llama": "runtime.llama", "RotaryConfig": "config", "RotaryError": "errors", "ReadError": "errors",
    "ModelInfo": "gguf_files.info", "activate": "runtime.activation", "deactivate": "runtime.activation",
}  # fmt: skip
__all__ = [
    "Llama", "ModelInfo", "ReadError", "RotaryConfig", "RotaryError", "__version__", "activate", "deactivate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rotary-llamacpp")
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
