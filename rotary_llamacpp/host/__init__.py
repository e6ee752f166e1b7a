# SPDX-License-Identifier: MIT
"""The machine: memory, processors, control groups, disks, signals, child processes. Knows no models."""
