# SPDX-License-Identifier: MIT
"""GGUF files without loading them: header, metadata, expert layout, imatrices."""
