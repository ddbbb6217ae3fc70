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


def candidate_mask(kind: str, numbers: tuple[int, ...], length: int, device: torch.device | None = None) -> Tensor:
    """(T, T) booleans: which keys (columns) a query (row) may read under one candidate of the masks method.

    `last(i)`: the key i back; `window(w)`: the last w, the query's own included; `first(k)`: the first k;
    `dilated(w, s)`: w keys at distances 0, s, 2s, ...; `causal`: all of the past.
    """
    key = torch.arange(length, device=device)
    distance = key[:, None] - key
    rules = {
        "last": lambda i: distance == i,
        "window": lambda w: distance < w,
        "first": lambda k: (key < k).expand(length, length),
        "dilated": lambda w, s: (distance % s == 0) & (distance < w * s),
        "causal": lambda: torch.ones_like(distance, dtype=torch.bool),
    }
    return rules[kind](*numbers) & (distance >= 0)


def effective_mask(candidates: list[tuple[str, tuple[int, ...]]], weights: Tensor, length: int) -> Tensor:
    """M = Σ_c w_c C_c (G, T, T) for weights (G, C); a row without support reads itself, with weight 1."""
    mask = sum(
        weight[:, None, None] * candidate_mask(*candidate, length, weights.device)
        for candidate, weight in zip(candidates, weights.unbind(1), strict=True)
    )
    empty = (mask == 0).all(-1, keepdim=True)
    return torch.where(empty, torch.eye(length, dtype=mask.dtype, device=mask.device), mask)


def masked_softmax_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """p ∝ exp(s)·M = softmax(s + log M) (B, H, T, T) for a mask M (B or 1, H or 1, T, T)."""
    support = mask > 0
    log_mask = torch.where(support, mask, 1).log().masked_fill(~support, -torch.inf)
    return (scores(q, k) + log_mask).softmax(-1)
