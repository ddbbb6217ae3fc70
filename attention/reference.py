"""Dense, obvious definitions of every method: what the fast code is tested against.

All work on queries and keys with equally many heads, build (T, T) matrices, and favour clarity over speed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """(T, T) booleans: True where the column (key) is not after the row (query)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q kᵀ / √D (B, H, T, T) for q and k (B, H, T, D)."""
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax attention weights (B, H, T, T) (arXiv 1706.03762, Eq. 1)."""
    hidden = ~causal_mask(q.shape[2], q.device)
    return scores(q, k).masked_fill(hidden, -torch.inf).softmax(-1)
