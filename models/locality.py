# SPDX-License-Identifier: MIT
"""Find the strength of a synthetic router's shared input that gives a wanted routing overlap.

The generator's router logits are a sum of three random parts, like the hidden state of a real model: a
*static* part, equal for all tokens (popular experts), a *memory* part, a weighted mean over the tokens so far
(here: layer 0's attention, whose weights depend on distance only), and the *token's own* part. This module
simulates that sum and searches the strength of the first two; it does not touch files or llama.cpp.

The ratio of static to memory strength was fitted to a real decode trace of Qwen3-30B-A3B (128 experts, 6
used, 128 tokens): overlap 38 % at lag 1, about 27 % from lag 6 on, and the LRU hit rates in models/README.md.
"""

import numpy as np

KERNEL_GAIN = 12.0  # attention score of a token with itself; sets how fast memory fades
STATIC, MEMORY = 3.0, 8.0


def attention_kernel(n, head_dim, freq_base):
    """Attention weights (n, n) of query t on key s when q = k before rotary embedding.

    The score is then the gain times the mean of cos(distance * theta_j): a slow, power-law-like decay.
    """
    theta = freq_base ** (-np.arange(head_dim // 2) / (head_dim // 2))
    by_distance = KERNEL_GAIN * np.cos(np.outer(np.arange(n), theta)).mean(axis=1)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    weights = np.where(distance >= 0, np.exp(by_distance[np.abs(distance)] - KERNEL_GAIN), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


class Simulation:
    """A three-part router whose random parts are fixed, to be evaluated at any strength."""

    def __init__(self, n_expert, weights, warm=32, layers=24):
        rng = np.random.default_rng(0)
        shape = (len(weights), layers, n_expert)
        self.own = rng.standard_normal(shape, dtype=np.float32)[warm:]
        new = rng.standard_normal(shape, dtype=np.float32)
        memory = np.tensordot(weights.astype(np.float32), new, axes=1)[warm:]
        self.shared = STATIC * rng.standard_normal((layers, n_expert), dtype=np.float32) + MEMORY * memory

    def choose(self, strength, n_used):
        """Experts chosen at this strength: (tokens, layers, n_used)."""
        logits = self.own + np.float32(strength) * self.shared
        return np.argpartition(-logits, n_used - 1, axis=2)[:, :, :n_used]


def strength_for(target, n_expert, n_used, head_dim, freq_base):
    """Strength at which the mean lag-1 overlap of the used experts is `target`.

    Parameters
    ----------
    target : float
        Mean share of a token's experts that the previous token used too, between chance
        (n_used / n_expert) and 0.9.

    Returns
    -------
    float
        Factor of both STATIC and MEMORY; at 0 the token alone decides the routing.
    """
    chance = n_used / n_expert
    if not chance <= target <= 0.9:
        raise ValueError(
            f"locality: {target:.2f} cannot be reached with {n_used} of {n_expert} experts; "
            f"the range is {chance:.2f} (chance) to 0.90; choose within it or none."
        )
    simulation = Simulation(n_expert, attention_kernel(160, head_dim, freq_base))
    low, high = 0.0, 8.0
    for _ in range(10):
        middle = (low + high) / 2
        chosen = simulation.choose(middle, n_used)
        shared = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).sum(axis=(2, 3)).mean() / n_used
        low, high = (middle, high) if shared < target else (low, middle)
    return (low + high) / 2
