"""Dense, obvious definitions of every method: what the fast code is tested against.

All work on queries and keys with equally many heads, build (T, T) matrices, and favour clarity over speed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


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


def top_mask(scores: Tensor, number: int) -> Tensor:
    """(B, H, T, T) booleans: whether key j is among the best `number` of the keys 0 to i, by scores (B, H, T).

    Of equal scores the earlier counts as better.
    """
    key = torch.arange(scores.shape[-1], device=scores.device)
    one, other = scores[..., :, None], scores[..., None, :]
    better = (one > other) | ((one == other) & (key[:, None] < key))  # whether the row's key beats the column's
    return (better.cumsum(-2) < number) & causal_mask(len(key), scores.device)


def induction_mask(tokens: Tensor, number: int) -> Tensor:
    """(B, 1, T, T) booleans: whether key j comes right after one of the `number` latest earlier places of token i."""
    earlier = (tokens[:, :, None] == tokens[:, None]).tril(-1)
    later_ones = earlier.flip(-1).cumsum(-1).flip(-1) - earlier.int()
    return F.pad(earlier & (later_ones < number), (1, -1))[:, None]


def combined_mask(
    candidates: list[tuple[str, tuple[int, ...]]],
    weights: Tensor,
    length: int,
    scores: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Σ_c w_c C_c (1 or B, G, T, T).

    Args:
        candidates: kinds and numbers.
        weights: (G, C), one row for each head, or one for all.
        length: T.
        scores: (B, H, T) of the keys, for `top`.
        tokens: (B, T) ids, for `induction`.
    """
    mask = weights.new_zeros(1, len(weights), length, length)
    for (kind, numbers), weight in zip(candidates, weights.unbind(1), strict=True):
        match kind:
            case "top":
                holds = top_mask(scores, *numbers)
            case "induction":
                holds = induction_mask(tokens, *numbers)
            case _:
                holds = candidate_mask(kind, numbers, length, weights.device)
        mask = mask + weight[:, None, None] * holds
    return mask


def effective_mask(
    candidates: list[tuple[str, tuple[int, ...]]],
    weights: Tensor,
    length: int,
    scores: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """M (1 or B, G, T, T): `combined_mask`, where a row without support reads itself, with weight 1."""
    mask = combined_mask(candidates, weights, length, scores, tokens)
    empty = (mask == 0).all(-1, keepdim=True)
    return torch.where(empty, torch.eye(length, dtype=mask.dtype, device=mask.device), mask)


def masked_softmax_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """p ∝ exp(s)·M = softmax(s + log M) (B, H, T, T) for a mask M (B or 1, H or 1, T, T)."""
    support = mask > 0
    log_mask = torch.where(support, mask, 1).log().masked_fill(~support, -torch.inf)
    return (scores(q, k) + log_mask).softmax(-1)


def visible_weights(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) over the keys that `visible` (broadcast to (B, H, T, N)) shows; 0 where it shows none."""
    lowest = torch.finfo(q.dtype).min
    return scores(q, k).masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0)


def nsa_visible(length: int, number: int, block: int, stride: int, device: torch.device | None = None) -> Tensor:
    """(T, N) booleans: which compressed blocks are complete at each query, i·d + l − 1 ≤ t (arXiv 2502.11089)."""
    last_token = torch.arange(number, device=device) * stride + block - 1
    return last_token <= torch.arange(length, device=device)[:, None]


def nsa_compression(
    k: Tensor, position: Tensor, hidden: Tensor, to_weights: Tensor, to_key: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """φ, block by block (arXiv 2502.11089, Eq. 7).

    Args:
        k: keys (B, H_kv, T, D).
        position: the encoding (H_kv, l, D) of the places in a block.
        hidden: first layer (H_kv, l·D, hidden), of the flattened block.
        to_weights: (H_kv, hidden, l), giving the weights over the block's tokens.
        to_key: (H_kv, hidden, D), giving the correction of the key.

    Returns:
        The compressed keys (B, H_kv, N, D), and the matrix (B, H_kv, N, T) that compresses values.
    """
    batch, heads, length, width = k.shape
    block = position.shape[1]
    keys, rows = [], []
    for first in range(0, length - block + 1, stride):
        tokens = k[:, :, first : first + block]
        units = F.gelu((tokens + position).flatten(2)[:, :, None] @ hidden)
        weights = (units @ to_weights).softmax(-1)
        keys.append(weights @ tokens + units @ to_key)
        rows.append(F.pad(weights, (first, length - block - first)))
    if not keys:
        return k.new_zeros(batch, heads, 0, width), k.new_zeros(batch, heads, 0, length)
    return torch.cat(keys, 2), torch.cat(rows, 2)


def nsa_selection_scores(weights: Tensor, kv_heads: int, block: int, stride: int, select_block: int) -> Tensor:
    """p_slc (B, H_kv, T, J) from p_cmp (B, H, T, N) (arXiv 2502.11089, Eq. 9 and 10, counted from 0).

    p_slc[j] = Σ_{m < l'/d} Σ_{n < l/d} p_cmp[(l'/d)·j + m − n], terms out of range 0, summed over the query heads of
    a key head; J = ⌈T / l'⌉.
    """
    length, number = weights.shape[2:]
    per_block = select_block // stride
    shared = weights.unflatten(1, (kv_heads, -1)).sum(2)
    result = weights.new_zeros(*shared.shape[:3], -(-length // select_block))
    for j in range(result.shape[-1]):
        for m in range(per_block):
            for n in range(block // stride):
                if 0 <= (i := per_block * j + m - n) < number:
                    result[..., j] += shared[..., i]
    return result


def nsa_selected_blocks(scores: Tensor, select_block: int, number: int, select_every: int) -> Tensor:
    """Which of the blocks (B, H_kv, T, J) a query reads, from their scores (B, H_kv, T, J).

    The first block, the query's own and the one before it, then those with the highest scores, the earlier of equal
    ones first, up to `number` in all. The scores are those of the first query of each `select_every`.
    """
    length, available = scores.shape[2:]
    query = torch.arange(length, device=scores.device)
    own, block = (query // select_block)[:, None], torch.arange(available, device=scores.device)
    ranked = scores[:, :, query // select_every * select_every]
    ranked = ranked.masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
    ranked = ranked.masked_fill(block > own, -torch.inf)
    best = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :number]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True) & (block <= own)


def nsa_window(length: int, window: int, device: torch.device | None = None) -> Tensor:
    """(T, T) booleans: the last `window` keys of each query, its own included."""
    return causal_mask(length, device).triu(1 - window)


def favor_log_features(x: Tensor, omega: Tensor, hyperbolic: bool) -> Tensor:
    """log φ(x) (…, m), φ(x) = m^(−1/2) exp(ωᵀx' − |x'|²/2) with x' = x D^(−1/4), so that E φ(x)·φ(y) = exp(x·y/√D).

    arXiv 2009.14794, Lemma 1 and Eq. 5. Hyperbolic: exp(±ωᵀx' − |x'|²/2), two features for each ω.

    Args:
        x: queries or keys (…, D).
        omega: rows of N(0, I), (m, D), or (m/2, D) where hyperbolic.
    """
    x = x / x.shape[-1] ** 0.25
    u = x @ omega.T
    u = torch.cat([u, -u], -1) if hyperbolic else u
    return u - x.square().sum(-1, keepdim=True) / 2 - math.log(u.shape[-1]) / 2


def relu_log_features(x: Tensor, omega: Tensor, epsilon: float) -> Tensor:
    """log φ(x) (…, m), φ(x) = m^(−1/2) (max(ωᵀx', 0) + ε) with x' = x D^(−1/4) (arXiv 2009.14794, Section 2.2)."""
    u = x / x.shape[-1] ** 0.25 @ omega.T
    return ((u.clamp_min(0) + epsilon) / omega.shape[0] ** 0.5).log()


def learned_log_features(
    x: Tensor, weight: Tensor, bias: Tensor, inner: Tensor | None = None, outer: Tensor | None = None
) -> Tensor:
    """log φ(x) = W x + b + V gelu(U x) (B, H, T, m) for x (B, H, T, D) (after arXiv 2402.04347).

    Args:
        weight, bias: W (H, D, m) and b (H, 1, m).
        inner, outer: U (H, D, hidden) and V (H, hidden, m), or None for a map without hidden layer.
    """
    u = x @ weight + bias
    return u if inner is None else u + F.gelu(x @ inner) @ outer


def performer_weights(
    q: Tensor,
    k: Tensor,
    q_log: Tensor,
    k_log: Tensor,
    window: int = 0,
    mix: Tensor | None = None,
    rates: Tensor | None = None,
    absolute: bool = True,
) -> Tensor:
    """Attention weights (B, H, T, T): exp(s_ij) for the last `window` keys, Σ_f φ_f(q_i) φ_f(k_j) before, normalised.

    Args:
        q, k: (B, H, T, D).
        q_log, k_log: log φ of queries and keys (B, H, T, m).
        window: w, the number of last keys with exact weights (arXiv 2410.10254, Eq. 6).
        mix: (H,) what is added to the log weights of the linear part.
        rates: (H, m) what a feature's log weight loses with every token between the window and the key.
        absolute: whether the linear part's weights stand for exp(s_ij); otherwise for exp(s_ij − s̄_i), where s̄_i is
            the mean score in the window.
    """
    steps = torch.arange(q.shape[2], device=q.device)
    distance = steps[:, None] - steps
    terms = q_log[..., :, None, :] + k_log[..., None, :, :]
    if rates is not None:
        terms = terms - rates[:, None, None] * (distance - window)[..., None]
    linear = terms.logsumexp(-1)
    if mix is not None:
        linear = linear + mix[:, None, None]
    exact = scores(q, k)
    if window and not absolute:
        near = ((distance >= 0) & (distance < window)).float()
        linear = linear + (exact * near).sum(-1, keepdim=True) / near.sum(-1, keepdim=True)
    weights = torch.where(distance < window, exact, linear)
    return weights.masked_fill(distance < 0, -torch.inf).softmax(-1)
