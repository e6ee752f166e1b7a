# SPDX-License-Identifier: MIT
"""The command line and its output on terminals."""
