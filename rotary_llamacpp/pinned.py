# SPDX-License-Identifier: MIT
"""The pinned versions that this release is made for.

The package imports this module; setup.py and the Makefile import it or read it as text, so it has plain
assignments and imports nothing.
"""

LLAMA_CPP_PYTHON = "0.3.36"  # its sdist carries the llama.cpp source the native library is compiled against
LLAMA_CPP_PYTHON_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"  # of that sdist
GGML_VERSION = "0.25.3"
REBUILD_LLAMA_CPP = (
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python "
    f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
)
