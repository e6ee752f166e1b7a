# SPDX-License-Identifier: MIT
"""The recipe of the tiny MoE model: data, model, train, export, in this order."""
