# SPDX-License-Identifier: MIT
"""Native tests under sanitizers (make sanitize)."""
