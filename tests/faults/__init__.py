# SPDX-License-Identifier: MIT
"""Failures and shortages under a paged model."""
