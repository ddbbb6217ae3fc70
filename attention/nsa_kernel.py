"""What native sparse attention computes, branch by branch, with no (T, T) matrix; `nsa.py` puts it together.

Shapes: q (B, H, T, D); keys and values (B, H_kv, S, D), by position. Queries come in blocks that start at a multiple
of the block's size. Positions are (P, T), with P = 1 where all rows of the batch agree and P = B where they do not;
where a row starts is one number in the first case and (B,) numbers in the second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # softmax attention of q, k, v and a mask


def take(x: Tensor, start: int | Tensor, count: int) -> Tensor:
    """(B, H, count, D): what lies in x (B, H, S, D) from `start` on; finite and meaningless outside of x."""
    size = x.shape[2]
    if isinstance(start, int):
        inside = x[:, :, max(start, 0) : min(start + count, size)]
        before, after = max(-start, 0), max(start + count - size, 0)
        return F.pad(inside, (0, 0, before, after)) if before or after else inside
    index = (start[:, None] + torch.arange(count, device=x.device)).clamp(0, size - 1)
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def fold(q: Tensor, kv_heads: int, size: int) -> Tensor:
    """(T / size, B·H_kv, G·size, D): query blocks as a batch; the G query heads of a key head are more rows."""
    blocks = q.unflatten(1, (kv_heads, -1)).unflatten(3, (-1, size))
    return blocks.permute(3, 0, 1, 2, 4, 5).flatten(1, 2).flatten(2, 3)


def unfold(out: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(B, H, T, D): the inverse of `fold`."""
    blocks = out.unflatten(2, (heads // kv_heads, -1)).unflatten(1, (-1, kv_heads))
    return blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


def fold_mask(mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(T / size, 1 or B·H_kv, G·size, S): masks (P, T / size, size, S) to go with folded queries."""
    mask = mask.transpose(0, 1).repeat(1, 1, heads // kv_heads, 1)
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(kv_heads, dim=1)


def window_branch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int | Tensor,
    positions: Tensor,
    window: int,
    block: int,
    attend: Attend,
) -> Tensor:
    """(B, H, T, D): attention over the last `window` keys, in blocks of queries.

    A block reads the keys that its queries see between them, as views that overlap.
    """
    heads, kv_heads = q.shape[1], keys.shape[1]
    before = -(-(window - 1) // 8) * 8  # matrix products are fastest where sizes are multiples of 8
    k, v = (
        take(t, start - before, before + q.shape[2])
        .unfold(2, before + block, block)
        .permute(2, 0, 1, 4, 3)
        .flatten(1, 2)
        for t in (keys, values)
    )
    queries = positions.unflatten(1, (-1, block))[..., None]
    sources = queries[:, :, :1] - before + torch.arange(before + block, device=q.device)
    visible = (sources >= 0) & (sources <= queries) & (sources > queries - window)
    out = attend(fold(q, kv_heads, block), k, v, fold_mask(visible, heads, kv_heads))
    return unfold(out, heads, kv_heads)


def compressed_branch(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, bounds: tuple[int, int], attend: Attend
) -> Tensor:
    """(B, H, T, D): attention over the compressed blocks that are complete, 0 for a query that sees none.

    Args:
        visible: (P, T) how many blocks each query sees; they are the first ones.
        bounds: the smallest and the largest of these numbers, or wider bounds.
    """
    if keys.shape[2] == 0:
        return torch.zeros_like(q)
    least, most = bounds[0], max(1, min(bounds[1], keys.shape[2]))
    visible, mask = visible[:, None, :, None], None
    if least < most:
        mask = torch.arange(most, device=q.device) < visible.clamp(min=1)
    out = attend(q, keys[:, :, :most], values[:, :, :most], mask)
    return out if least > 0 else out.masked_fill(visible == 0, 0)


def gather_blocks(x: Tensor, blocks: Tensor, size: int) -> Tensor:
    """(G, B·H_kv, n·size, D): blocks (G, B·H_kv, n) of `size` tokens, out of x (B, H_kv, S, D)."""
    heads = torch.arange(blocks.shape[1], device=x.device)[:, None] * (x.shape[2] // size)
    table = x.reshape(-1, size * x.shape[3])
    return table.index_select(0, (blocks + heads).flatten()).view(*blocks.shape[:2], -1, x.shape[3])


def selected_branch(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, positions: Tensor, size: int, every: int, attend: Attend
) -> Tensor:
    """(B, H, T, D): attention over the tokens of the chosen blocks (B, H_kv, T / every, n) of `size` tokens."""
    heads, kv_heads = q.shape[1], keys.shape[1]
    index = blocks.flatten(0, 1).transpose(0, 1)
    k, v = (gather_blocks(t, index, size) for t in (keys, values))
    readable = selected_mask(positions.unflatten(1, (-1, every)), blocks.shape[-1], size)
    mask = fold_mask(readable, heads, kv_heads)
    if 1 < len(mask) < len(index):
        mask = mask.repeat(len(index) // len(mask), 1, 1, 1)
    out = attend(fold(q, kv_heads, every), k, v, mask)
    return unfold(out, heads, kv_heads)


def selected_mask(positions: Tensor, number: int, size: int) -> Tensor:
    """(P, C, every, number·size): which keys of its chosen blocks a query may read; positions (P, C, every).

    The last block is the query's own, of which it reads the part up to itself. A query in block c has c + 1 blocks
    to choose from; where that is less than `number`, the first of the chosen ones do not exist.
    """
    exists = torch.arange(number - 1, 0, -1, device=positions.device) <= positions[..., None] // size
    own = torch.arange(size, device=positions.device) <= positions[..., None] % size
    return torch.cat([exists.repeat_interleave(size, dim=-1), own], dim=-1)


@torch.no_grad()
def selection_scores(q: Tensor, keys: Tensor, visible: Tensor, overlap: int, per_block: int, number: int) -> Tensor:
    """(B, H_kv, L, number): importance of each selection block to each query (arXiv 2502.11089, Eq. 9 and 10).

    p_slc[j] = Σ_{m < l'/d} Σ_{n < l/d} p_cmp[(l'/d)·j + m − n], summed over the query heads of a key head; terms out
    of range are 0.

    Args:
        q: queries (B, H, L, D).
        keys: compressed keys (B, H_kv, N, D).
        visible: (P, L) how many of them each query sees.
        overlap: l/d.
        per_block: l'/d.
    """
    grouped = q.unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
    hidden = torch.arange(keys.shape[2], device=q.device) >= visible[:, None, None, :, None]
    scores = (grouped @ keys[:, :, None].transpose(-1, -2)).float().masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0).sum(2)
    padded, spans = F.pad(weights, (overlap - 1, number * per_block - keys.shape[2])), number * per_block
    covering = sum(padded[..., n : n + spans] for n in range(overlap))
    return sum(covering[..., m::per_block] for m in range(per_block))


@torch.no_grad()
def choose_blocks(scores: Tensor, current: Tensor, number: int) -> Tensor:
    """(B, H_kv, L, number) blocks for queries whose own block is `current` (P, L), from scores (B, H_kv, L, J).

    Last come the first block, the one before the query's and the query's own; before them those with the highest
    scores, the best one last, and of equal ones the earlier one. Where fewer exist, the first numbers mean nothing.
    """
    available = scores.shape[-1]
    forced = torch.stack([torch.zeros_like(current), current - 1, current], dim=-1).clamp(0, available - 1)
    chosen = [forced[:, None].expand(*scores.shape[:3], -1)]
    candidate = torch.arange(available, device=scores.device)
    barred = (candidate == 0) | (candidate >= current[:, None, :, None] - 1)
    left = scores.masked_fill(barred, -1)
    for _ in range(number - chosen[0].shape[-1]):
        best = left.argmax(-1, keepdim=True)  # the first of equal ones
        left.scatter_(-1, best, -1)
        chosen.insert(0, best)
    return torch.cat(chosen, dim=-1)
