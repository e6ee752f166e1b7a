# SPDX-License-Identifier: MIT
"""Python alone: no model is computed."""
