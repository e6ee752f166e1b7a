# SPDX-License-Identifier: MIT
"""Installing, and the patches for llama-cpp-python."""
