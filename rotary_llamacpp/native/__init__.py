# SPDX-License-Identifier: MIT
"""The native library and llama.cpp, as Python calls them. No other room imports cffi or llama_cpp."""
