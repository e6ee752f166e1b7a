# SPDX-License-Identifier: MIT
"""Output for people: progress, the live line, the panel, tables, plans and the report."""
