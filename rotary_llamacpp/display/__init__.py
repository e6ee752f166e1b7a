# SPDX-License-Identifier: MIT
"""What people see of a run or a trace: progress, the live line, the panel, the report."""
