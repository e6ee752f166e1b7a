# SPDX-License-Identifier: MIT
"""Divides a budget into slots of layers as the native library does, so that a plan does not need the library.

tests/unit/test_plan.py compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Budget
from ..errors import BudgetError
from ..gguf_files.info import LayerInfo
from ..units import mib


def divide(budget: str, layers: Sequence[LayerInfo], free_bytes: int, name: str) -> tuple[list[int], int]:
    """Divide a budget; return slots of each layer, and the bytes that the budget stands for.

    Parameters
    ----------
    budget : str
        As `rotary_llamacpp.RotaryConfig.budget`.
    free_bytes : int
        Bytes that ``"auto"`` may take.
    name : str
        Name of the model in messages.

    Raises
    ------
    BudgetError
        The text is not a budget, or the budget cannot hold one token's experts.
    """
    parsed = Budget.parse(budget)
    wanted = budget_bytes(parsed, layers, free_bytes)
    minimum = sum(layer.chosen_bytes for layer in layers)
    if wanted < minimum:
        raise BudgetError(
            f"{name}: budget {budget} is {mib(wanted)}; one token's experts take "
            f"{mib(minimum)} in {len(layers)} layers; "
            + ("free memory" if parsed.kind == "auto" else "raise it or free memory")
        )
    if parsed.kind == "slots":
        return [min(layer.n_expert, int(parsed.amount)) for layer in layers], wanted
    return raised_evenly(wanted, layers), wanted


def budget_bytes(budget: Budget, layers: Sequence[LayerInfo], free_bytes: int) -> int:
    """Bytes that a budget stands for, at most those of all experts."""
    everything = sum(layer.layer_bytes for layer in layers)
    wanted = {
        "auto": free_bytes,
        "min": sum(layer.chosen_bytes for layer in layers),
        "share": round(everything * budget.amount / 100),
        "slots": sum(layer.expert_bytes * min(layer.n_expert, int(budget.amount)) for layer in layers),
        "bytes": int(budget.amount),
    }[budget.kind]
    return min(everything, max(wanted, 0))


def raised_evenly(n_bytes: int, layers: Sequence[LayerInfo]) -> list[int]:
    """Raise the layers with the fewest slots until nothing fits, as native/src/cache/division.cpp does."""
    slots = [layer.n_expert_used for layer in layers]
    used = sum(n * layer.expert_bytes for n, layer in zip(slots, layers, strict=True))
    while True:
        able = [
            n
            for n, layer in zip(slots, layers, strict=True)
            if n < layer.n_expert and used + layer.expert_bytes <= n_bytes
        ]
        if not able:
            return slots
        lowest = min(able)
        for i, layer in enumerate(layers):
            if slots[i] == lowest and lowest < layer.n_expert and used + layer.expert_bytes <= n_bytes:
                slots[i] += 1
                used += layer.expert_bytes
