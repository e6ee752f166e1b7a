# SPDX-License-Identifier: MIT
"""Everything beside everything, for long (make soak)."""
