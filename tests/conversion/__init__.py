# SPDX-License-Identifier: MIT
"""rotary convert: layouts, folders, types, interruptions."""
