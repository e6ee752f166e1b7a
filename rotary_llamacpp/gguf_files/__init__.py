# SPDX-License-Identifier: MIT
"""GGUF files, without loading models: headers, metadata, layout of experts, importance matrices."""
