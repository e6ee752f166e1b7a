# SPDX-License-Identifier: MIT
"""Everything at the same time, for long (make soak)."""
