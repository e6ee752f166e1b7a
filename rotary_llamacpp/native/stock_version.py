# SPDX-License-Identifier: MIT
"""Checks the version of llama-cpp-python, without importing it."""

from __future__ import annotations

import importlib.metadata

from .. import pinned
from ..errors import VersionError


def check_llama_cpp_version() -> str:
    """Return the version of the installed llama-cpp-python, which must be the pinned one."""
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise VersionError(
            f"llama-cpp-python: not installed; {pinned.LLAMA_CPP_PYTHON} is needed; run `pip install "
            f"llama-cpp-python=={pinned.LLAMA_CPP_PYTHON}`"
        ) from None
    if found != pinned.LLAMA_CPP_PYTHON:
        raise VersionError(
            f"llama-cpp-python: version {found} is installed; rotary-llamacpp is made for "
            f"{pinned.LLAMA_CPP_PYTHON}; run `pip install llama-cpp-python=={pinned.LLAMA_CPP_PYTHON}`"
        )
    return found
