# SPDX-License-Identifier: MIT
"""Models that are computed with, compared with stock bit for bit."""
