# SPDX-License-Identifier: MIT
"""Installing, and the patches for what is installed."""
