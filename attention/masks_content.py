"""Keys that depend on the text, for the masks `top(n)` and `induction(n)`: which they are, as columns for the kernel.

Each key has a rank for each query, counted from 0; the mask with number n holds for the ranks below n. Neither the
scores nor the ids have gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks_plan import Plan
from .mechanism import blocks_for, repeat_heads, traced
from .state import State, store

ABSENT = torch.iinfo(torch.int32).max  # rank of a key that a query does not have


class Columns(NamedTuple):
    """Further keys that blocks of queries read.

    Attributes:
        positions: (B, 1 or H, N, K) of the keys that each block reads; arbitrary where the key is absent.
        rank: (B, 1 or H, N, b, K) the rank of each key for each query.
    """

    positions: Tensor
    rank: Tensor


class Best(NamedTuple):
    """The keys with the highest scores: highest first, of equal ones the earlier first.

    Attributes:
        scores: (..., n), −∞ past the last key.
        positions: (..., n), arbitrary there.
    """

    scores: Tensor
    positions: Tensor

    @classmethod
    def none(cls, like: Tensor, count: int) -> Best:
        """Room for `count` keys, none there yet, for scores `like` (..., ·)."""
        scores = like.new_full((*like.shape[:-1], count), -torch.inf)
        return cls(scores, torch.zeros_like(scores, dtype=torch.long))

    def of(self, blocks: slice) -> Best:
        """Those of some blocks, from (B, H, N, n)."""
        return Best(*(t[:, :, blocks] for t in self))

    def followed_by(self, others: Best) -> Best:
        """(B, H, N + M, n): the blocks of these, then those of the others."""
        return Best(*(torch.cat(pair, 2) for pair in zip(self, others, strict=True)))

    def joined(self, later: Best, count: int) -> Best:
        """The best `count` of both; those of `later`, in any order, stand after all of these."""
        scores, order = torch.cat([self.scores, later.scores], -1).sort(dim=-1, descending=True, stable=True)
        positions = torch.cat([self.positions, later.positions], -1).gather(-1, order[..., :count])
        return Best(scores[..., :count], positions)


class ContentState(State):
    """Keys and values of every token, the tokens' ids, and which keys have the highest scores.

    Attributes:
        plan: the plan that this state belongs to.
        pairs: (B, H_kv, capacity, 2 D) each key with its value behind it, so that one index finds both.
        tokens: (B, 1, capacity, 1) ids by position; None where no head looks for them.
        best_scores, best_positions: (B, H, n) of `Best`; None at the start, and where no head reads by score.
        logs: log M for a query that has all of its keys, by kind of key, once one came.
        _firsts: batch, heads and capacity, and the first row of each head in a flat `pairs`.
    """

    batched = ("pairs", "tokens", "best_scores", "best_positions")
    summarised = ("best_scores", "best_positions")

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.pairs: Tensor | None = None
        self.tokens: Tensor | None = None
        self.best_scores: Tensor | None = None
        self.best_positions: Tensor | None = None
        self.logs: dict[str, Tensor] | None = None
        self._firsts: tuple[tuple[int, int, int], Tensor] | None = None

    def reset(self) -> None:
        super().reset()
        self.logs = None

    def can_remove(self, count: int) -> bool:
        return not self.plan.top or super().can_remove(count)

    def remove(self, count: int) -> None:
        super().remove(count)
        if not self.plan.top:
            return
        for block in self.rewind():
            scores = block.tensors[0]
            best = Best.none(scores, self.plan.top) if self.best_scores is None else self.best_keys()
            self._rank(best, scores, block.lengths)
            self.advance(block.columns, block.lengths)

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        """Stores T tokens (B, H_kv, T, D) and counts them."""
        self.pairs = store(self.pairs, torch.cat([k, v], -1), self.position, self.seen + k.shape[2])
        self.advance(k.shape[2], lengths)

    def read_all(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, seen, D) by position."""
        return self.pairs[:, :, : self.seen].chunk(2, -1)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, K, D) at positions (B, H, K)."""
        kv_heads, capacity, width = self.pairs.shape[1:]
        batch, heads, count = index.shape
        if self._firsts is None or self._firsts[0] != (batch, heads, capacity):
            firsts = torch.arange(0, batch * kv_heads * capacity, capacity, device=index.device)
            self._firsts = (batch, heads, capacity), repeat_heads(firsts.view(batch, kv_heads, 1), heads)
        pairs = self.pairs.view(-1, width).index_select(0, (index + self._firsts[1]).view(-1))
        return pairs.view(batch, heads, count, width).chunk(2, -1)

    def best_keys(self) -> Best:
        """The best keys so far; there must be some."""
        return Best(self.best_scores, self.best_positions)

    def rank(self, before: Best, scores: Tensor, lengths: Tensor | None) -> Best:
        """Takes in the scores (B, H, T) of tokens that are not counted yet, after the best keys before them.

        Returns:
            The best of all.
        """
        self.note(scores.shape[2], lengths, scores)
        return self._rank(before, scores, lengths)

    def _rank(self, before: Best, scores: Tensor, lengths: Tensor | None) -> Best:
        positions = self.seen if self.lengths is None else self.lengths[:, None, None]
        if scores.shape[2] > 1 or lengths is not None:
            place = torch.arange(scores.shape[2], device=scores.device)
            positions = positions + place
            scores = scores if lengths is None else scores.masked_fill(place >= lengths[:, None, None], -torch.inf)
        if isinstance(positions, int):
            positions = torch.full_like(scores, positions, dtype=torch.long)
        best = before.joined(Best(scores, positions.expand_as(scores)), before.scores.shape[2])
        self.best_scores, self.best_positions = best
        return best

    def append_tokens(self, tokens: Tensor) -> Tensor:
        """Stores the ids (B, T) of tokens that are not counted yet; returns all of them (B, S)."""
        needed = self.seen + tokens.shape[1]
        self.tokens = store(self.tokens, tokens[:, None, :, None], self.position, needed)
        return self.tokens[:, 0, :needed, 0]


def best_columns(before: Best, scores: Tensor, start: Tensor, block: int) -> Columns:
    """The keys of `top`: for each block of b queries, the best n before it, and the block's own.

    Args:
        before: the best n keys (B, H, n) before the first query.
        scores: (B, H, T) of the queries' own keys.
        start: (1 or B,) the position of the first query.
        block: b.
    """
    length = scores.shape[-1]
    blocks = blocks_for(length, block)
    scores = F.pad(scores, (0, blocks * block - length), value=-torch.inf).unflatten(-1, (blocks, block))
    queries = torch.arange(blocks * block, device=start.device).view(1, blocks, block) + start[:, None, None]
    own = Best(scores, queries[:, None].expand_as(scores))
    scores, positions = (torch.cat(pair, -1) for pair in zip(_best_before(before, own), own, strict=True))
    has = (positions[..., None, :] <= queries[:, None, ..., None]) & (scores > -torch.inf)[..., None, :]
    # Highest first, the rank of a key that a query has is the number of those to its left that it has too. The columns
    # themselves keep their order, or what follows a query would change the order of its sums.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    counts = _permuted(has, order).cumsum(-1, dtype=torch.int32)
    rank = _permuted(counts, order.argsort(-1)) - 1
    return Columns(positions, rank.masked_fill(~has, ABSENT))


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """Columns of x (B, H, N, b, K) in the order (B, H, N, K) of their block."""
    return x.gather(-1, order[..., None, :].expand_as(x))


def _best_before(before: Best, own: Best) -> Best:
    """(B, H, N, n) the best keys before each of N blocks, in log₂ N steps (Hillis & Steele 1986).

    Args:
        before: (B, H, n) those before the first block.
        own: (B, H, N, b) the keys of each block.
    """
    if traced():
        return _best_before_at_once(before, own)
    count = before.scores.shape[-1]
    last = own.of(slice(-1))
    last = last.joined(Best.none(last.scores, count), count)
    best = Best(*(t[:, :, None] for t in before)).followed_by(last)
    step = 1
    while step < best.scores.shape[2]:
        joined = best.of(slice(-step)).joined(best.of(slice(step, None)), count)
        best = best.of(slice(step)).followed_by(joined)
        step *= 2
    return best


def _best_before_at_once(before: Best, own: Best) -> Best:
    """`_best_before` in operations that a graph holds for any number of blocks, each of which goes through all keys."""
    count, (blocks, size) = before.scores.shape[-1], own.scores.shape[2:]
    place = torch.arange(blocks, device=own.scores.device)
    later = (place >= place[:, None])[..., None].expand(-1, -1, size).flatten(1)  # (N, N b) not before a block
    scores = own.scores.flatten(2)[:, :, None].expand(-1, -1, blocks, -1).masked_fill(later, -torch.inf)
    positions = own.positions.flatten(2)[:, :, None].expand_as(scores)
    first = Best(*(t[:, :, None].expand(-1, -1, blocks, -1) for t in before))
    return first.joined(Best(scores, positions), count)


def induction_columns(tokens: Tensor, start: Tensor, length: int, count: int, block: int) -> Columns:
    """The keys of `induction`, each in the list of one query of its block.

    Args:
        tokens: (B, S) ids by position, those of the queries among them.
        start: (1 or B,) the position of the first query.
        length: queries T.
        count: n, keys for each.
        block: queries b in a block.
    """
    found = _followers(tokens, start, length, count)
    blocks = blocks_for(length, block)
    found = F.pad(found, (0, 0, 0, blocks * block - length)).unflatten(1, (blocks, block))
    own = torch.eye(block, dtype=torch.bool, device=tokens.device)[..., None]
    order = torch.arange(count, dtype=torch.int32, device=tokens.device)
    rank = torch.where(own & (found > 0)[:, :, None], order, ABSENT)
    return Columns(found.flatten(2)[:, None], rank.flatten(3)[:, None])


def _followers(tokens: Tensor, start: Tensor, length: int, count: int) -> Tensor:
    """(B, T, n) the positions after the latest occurrences of a query's token, the latest first; 0 past the last one.

    A query's own occurrence is none of them.
    """
    size = tokens.shape[1]
    query = (start[:, None] + torch.arange(length, device=tokens.device)).clamp(max=size - 1).expand(len(tokens), -1)
    ids = tokens.gather(1, query)
    by_id = tokens.argsort(dim=1, stable=True)  # so the occurrences of a token stand side by side, the latest last
    place = by_id.argsort(1).gather(1, query)[..., None] - torch.arange(1, count + 1, device=tokens.device)
    earlier = by_id.gather(1, place.clamp(min=0).flatten(1))
    same = (place >= 0) & (tokens.gather(1, earlier).view_as(place) == ids[..., None])
    return torch.where(same, earlier.view_as(place) + 1, 0)


def followers_of_one(tokens: Tensor, ids: Tensor, position: int | Tensor, count: int) -> Tensor:
    """(B, 1, n) what `_followers` finds for the one token (B, 1) at `position`, one for all rows or (B, 1, 1)."""
    if isinstance(position, int):
        tokens = tokens[:, :position]
    after = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    same = tokens == ids
    if not isinstance(position, int):
        same &= after <= position[:, 0]
    found = torch.where(same, after, 0).topk(min(count, len(after))).values
    found = found if found.shape[1] == count else F.pad(found, (0, count - found.shape[1]))
    return found[:, None]
