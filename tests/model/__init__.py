# SPDX-License-Identifier: MIT
"""Runs of models, compared with stock bit for bit."""
