# SPDX-License-Identifier: MIT
"""The library's own logic, through its C API or compiled alone, mostly without a model."""
