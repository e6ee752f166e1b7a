# SPDX-License-Identifier: MIT
"""Made-up traces and profiles."""

from __future__ import annotations

import itertools

import numpy as np

from rotary_llamacpp import traces
from rotary_llamacpp.traces import profiles


def made(ids, sizes=(1000,), n_expert=8, phase=None):
    """A trace of one sequence with experts ids[token][layer][k]; all tokens are decode by default."""
    ids = np.array(ids, np.int32)
    n_tokens, n_layers, n_used = ids.shape
    step, layer = np.divmod(np.arange(n_tokens * n_layers), n_layers)
    return traces.Trace(
        sequence=np.zeros_like(step), phase=np.ones_like(step) if phase is None else np.array(phase)[step],
        step=step, layer=layer, experts=ids.reshape(-1, n_used),
        weights=np.full((len(step), n_used), 0.5, np.float32), resident=np.zeros((len(step), n_used), bool),
        n_expert=n_expert, expert_bytes=dict(enumerate(itertools.islice(itertools.cycle(sizes), n_layers))),
        about={"model": "made"},
    )  # fmt: skip


def numbered(n_layers=6, n_expert=32, first=0):
    """A profile of half of the experts: (first + i) % n_expert is the i-th most popular in each layer."""
    popularity = np.zeros((n_layers, n_expert), np.float32)
    for rank in range(n_expert // 2):
        popularity[:, (first + rank) % n_expert] = 0.9 - rank / 100
    pairs = np.zeros((n_layers - 1, n_expert, n_expert), np.float16)
    return profiles.Profile(list(range(n_layers)), popularity, pairs, 100, {})
