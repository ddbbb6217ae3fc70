"""What native sparse attention computes, branch by branch, with no (T, T) matrix; `nsa.py` puts it together.

Shapes: q (B, H, T, D); keys and values (B, H_kv, S, D), by position. Queries come in blocks that start at a multiple
of the block's size. Positions are (P, T), with P = 1 where all rows of the batch agree and P = B where they do not;
where a row starts is one number in the first case and (B,) numbers in the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_attention import block_attention
from .mechanism import repeat_heads, traced

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # softmax attention of q, k, v and a mask


def take(x: Tensor, start: int | Tensor, count: int) -> Tensor:
    """(B, H, count, D): what lies in x (B, H, S, D) from `start` on; finite and meaningless outside of x."""
    size = x.shape[2]
    if traced() and not isinstance(start, Tensor):
        return x.index_select(2, (start + torch.arange(count, device=x.device)).clamp(0, size - 1))
    if isinstance(start, int):
        inside = x[:, :, max(start, 0) : min(start + count, size)]
        before, after = max(-start, 0), max(start + count - size, 0)
        return F.pad(inside, (0, 0, before, after)) if before or after else inside
    index = (start[:, None] + torch.arange(count, device=x.device)).clamp(0, size - 1)
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def window_branch(
    q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, window: int, block: int, dropout: float
) -> Tensor:
    """(B, H, T, D): attention over the last `window` keys, in blocks of queries that read what any of them sees."""
    before = -(-(window - 1) // 8) * 8  # matrix products are fastest where sizes are multiples of 8
    run, number = math.gcd(before, block), q.shape[2] // block
    starts = _starts(start, block, number, q.device)
    runs = (starts[..., None] - before) // run + torch.arange((before + block) // run, device=q.device)
    distinct = _distinct(start, block, number, -(-before // block))
    queries = starts[:, :distinct, None, None] + torch.arange(block, device=q.device)[:, None]
    sources = starts[:, :distinct, None, None] - before + torch.arange(before + block, device=q.device)
    visible = (sources >= 0) & (sources <= queries) & (sources > queries - window)
    return _by_block(q, keys, values, visible, runs.clamp(0, keys.shape[2] // run - 1), run, dropout)


def selected_branch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    start: int | Tensor,
    size: int,
    every: int,
    dropout: float,
) -> Tensor:
    """(B, H, T, D): attention over the tokens of the chosen blocks (B, H_kv, T / every, n) of `size` tokens."""
    number, groups = blocks.shape[-1], blocks.shape[2]
    distinct = _distinct(start, size, groups, number - 1) if every == size else groups
    starts = _starts(start, every, groups, q.device)[:, :distinct]
    readable = selected_mask(starts[..., None] + torch.arange(every, device=q.device), number, size)
    return _by_block(q, keys, values, readable, repeat_heads(blocks, q.shape[1]).flatten(0, 1), size, dropout)


def _starts(start: int | Tensor, block: int, number: int, device: torch.device) -> Tensor:
    """(P, number) positions of the first queries of consecutive blocks."""
    first = start[:, None] if isinstance(start, Tensor) else start
    return (first + block * torch.arange(number, device=device)).view(-1, number)


def _distinct(start: int | Tensor, block: int, number: int, early: int) -> int:
    """How many of `number` blocks need a mask of their own, where all but the text's first `early` blocks share one."""
    return number if traced() or isinstance(start, Tensor) else max(1, min(number, early + 1 - start // block))


def _by_block(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, runs: Tensor, run: int, dropout: float
) -> Tensor:
    """`block_attention` with a mask (P, N, b, K) and runs (P or B·H, N, R) that may be the same for all heads."""
    batch, heads = q.shape[:2]
    bias = torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, -torch.inf)
    if len(bias) > 1:
        bias = bias.repeat_interleave(heads, 0)
    if 1 < len(runs) < batch * heads:
        runs = runs.repeat_interleave(heads, 0)
    return block_attention(q, repeat_heads(keys, heads), repeat_heads(values, heads), bias, runs, run, dropout)


def compressed_branch(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, bounds: tuple[int, int] | None, attend: Attend
) -> Tensor:
    """(B, H, T, D): attention over the compressed blocks that are complete, 0 for a query that sees none.

    Args:
        visible: (P, T) how many blocks each query sees; they are the first ones.
        bounds: the smallest and the largest of these numbers, or wider bounds; None: 0 and all, and there are some.
    """
    if bounds is None:
        mask = torch.arange(keys.shape[2], device=q.device) < visible[:, None, :, None].clamp(min=1)
        return attend(q, keys, values, mask).masked_fill(visible[:, None, :, None] == 0, 0)
    if keys.shape[2] == 0:
        return torch.zeros_like(q)
    least, most = bounds[0], max(1, min(bounds[1], keys.shape[2]))
    visible, mask = visible[:, None, :, None], None
    if least < most:
        mask = torch.arange(most, device=q.device) < visible.clamp(min=1)
    out = attend(q, keys[:, :, :most], values[:, :, :most], mask)
    return out if least > 0 else out.masked_fill(visible == 0, 0)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Softmax attention (B, H, T, D) over the few keys (B, H_kv, N, D) that `mask`, (B, H, T, N) or fewer, shows."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v


def take_from(x: Tensor, rows: Tensor, starts: Tensor, count: int) -> Tensor:
    """(R, H, count, D): of some rows (R,) of x (B, H, S, D) what lies inside of x from `starts` (R,) on."""
    places = (starts[:, None] + torch.arange(count, device=x.device))[:, None]
    return x[rows[:, None, None], torch.arange(x.shape[1], device=x.device)[:, None], places]


def gather_blocks(
    tensors: tuple[Tensor, Tensor], blocks: Tensor, size: int, rows: Tensor | None = None
) -> list[Tensor]:
    """(R, H_kv, n·size, D) each: blocks (R, H_kv, n) of `size` tokens, out of two tensors (B, H_kv, S, D).

    Args:
        rows: (R,) of the batch; None: all.
    """
    batch, heads, length, width = tensors[0].shape
    first = torch.arange(0, batch * heads * (length // size), length // size, device=blocks.device)
    first = first.view(batch, heads, 1)
    chosen = (blocks + (first if rows is None else first[rows])).flatten()
    tables = (t.reshape(-1, size * width) for t in tensors)
    return [table.index_select(0, chosen).view(*blocks.shape[:2], -1, width) for table in tables]


def selected_mask(positions: Tensor, number: int, size: int) -> Tensor:
    """(P, C, every, number·size): which keys of its chosen blocks a query may read; positions (P, C, every).

    The last block is the query's own, of which it reads the part up to itself. A query in block c has c + 1 blocks
    to choose from; where that is less than `number`, the first of the chosen ones do not exist.
    """
    exists = torch.arange(number - 1, 0, -1, device=positions.device) <= positions[..., None] // size
    own = torch.arange(size, device=positions.device) <= positions[..., None] % size
    return torch.cat([exists.repeat_interleave(size, dim=-1), own], dim=-1)


def token_masks(
    blocks: tuple[int, int, int], size: int, window: int, summaries: int, device: torch.device
) -> tuple[Tensor, ...]:
    """For each token of a block, (3, R) what the compressed, selected and window branches read: 0 there, −∞ elsewhere.

    Args:
        blocks: how many blocks of keys there are: selected ones, further ones of the window, and those that are both,
            of which the last is the token's own.
        size: tokens of a block.
        window: w.
        summaries: compressed keys after these; there is room for twice as many. Before the blocks there is one key,
            which the compressed branch reads while there are none.
    """
    further, both, stop = (1 + size * sum(blocks[:kinds]) for kinds in (1, 2, 3))
    place = torch.arange(stop + 2 * summaries + 8, device=device)
    own = stop - size + torch.arange(size, device=device)[:, None]
    past = (place >= 1) & (place <= own)
    reads = (
        (place >= stop if summaries else place == 0).expand_as(past),
        past & ((place < further) | (place >= both)),
        past & (place >= further) & (place > own - window),
    )
    hidden = ~torch.stack(reads, 1)
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf).unbind()


def row_masks(
    blocks: tuple[int, int, int],
    size: int,
    window: int,
    summaries: int,
    compressed: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`token_masks` for rows that stand at any positions, all in the layout of a long text.

    Args:
        blocks, size, window: as there.
        summaries: compressed keys that there is room for.
        compressed: d and l, tokens from one compressed block to the next, and of one.

    Returns:
        (size, 3, R) by the token's place in its block, and (R,) the position from which on a text has what lies there.
    """
    masks = token_masks(blocks, size, window, max(summaries, 1), device)
    selected, further, both = blocks
    back = (
        [both + selected - 1 - i for i in range(selected)],
        range(further + both - 1, both - 1, -1),
        range(both)[::-1],
    )
    stride, block = compressed
    begins = torch.tensor([size * number for kind in back for number in kind], device=device)
    ends = stride * torch.arange(summaries, device=device) + block - 1
    first = torch.cat([begins.new_zeros(1), begins.repeat_interleave(size), ends])
    by_place = torch.stack(masks)[..., : len(first)].clone()
    by_place[:, 0, 0] = 0
    return by_place, first


@torch.no_grad()
def selection_scores(
    q: Tensor, keys: Tensor, visible: Tensor | None, overlap: int, per_block: int, number: int
) -> Tensor:
    """(B, H_kv, L, number): importance of each selection block to each query (arXiv 2502.11089, Eq. 9 and 10).

    p_slc[j] = Σ_{m < l'/d} Σ_{n < l/d} p_cmp[(l'/d)·j + m − n], summed over the query heads of a key head; terms out
    of range are 0.

    Args:
        q: queries (B, H, L, D).
        keys: compressed keys (B, H_kv, N, D).
        visible: (P, L) how many of them each query sees; None: all.
        overlap: l/d.
        per_block: l'/d.
    """
    grouped = q.unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
    scores = (grouped @ keys[:, :, None].transpose(-1, -2)).float()
    if visible is None:
        weights = scores.softmax(-1).sum(2)
    else:
        hidden = torch.arange(keys.shape[2], device=q.device) >= visible[:, None, None, :, None]
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(hidden, 0).sum(2)
    padded, spans = F.pad(weights, (overlap - 1, number * per_block - keys.shape[2])), number * per_block
    if overlap == per_block == 1:
        return padded
    covering = sum(padded[..., n : n + spans] for n in range(overlap))
    return sum(covering.unflatten(-1, (number, per_block)).unbind(-1))


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
