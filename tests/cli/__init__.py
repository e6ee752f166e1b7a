# SPDX-License-Identifier: MIT
"""The command line and what it draws on terminals."""
