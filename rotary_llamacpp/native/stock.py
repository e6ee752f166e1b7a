# SPDX-License-Identifier: MIT
"""Imports stock llama_cpp in one place; if that fails, raises a LibraryError with a one-line message.

The import fails in many ways: RuntimeError or OSError for a shared library that is missing or that lacks
another one, AttributeError for one of another version, ImportError for a package.
"""

from __future__ import annotations

import os

from .. import pinned
from ..errors import LibraryError
from .stock_version import check_llama_cpp_version

_MAX_LETTERS = 400  # of a message that is passed on; numpy's fill a page


def _reason(error: Exception) -> LibraryError:
    if isinstance(error, ModuleNotFoundError) and error.name == "llama_cpp":
        check_llama_cpp_version()  # raises a clearer error if it is not installed
    said = " ".join(str(error).split())[:_MAX_LETTERS]
    place = os.environ.get("LLAMA_CPP_LIB_PATH")
    if place is not None:
        return LibraryError(
            f"llama_cpp: cannot be imported, {said}; LLAMA_CPP_LIB_PATH is {place}, where libllama.so of "
            f"llama-cpp-python {pinned.LLAMA_CPP_PYTHON} is expected; unset it"
        )
    return LibraryError(
        f"llama_cpp: cannot be imported, {said}; llama-cpp-python {pinned.LLAMA_CPP_PYTHON} and its "
        "dependencies are needed; install what is missing, or build it here with "
        f"`{pinned.REBUILD_LLAMA_CPP}`"
    )


try:
    import llama_cpp
    import llama_cpp.llama_cpp as llama_api
except (ImportError, OSError, RuntimeError, AttributeError) as error_:
    raise _reason(error_) from error_

__all__ = ["llama_api", "llama_cpp"]
