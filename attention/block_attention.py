"""Softmax attention in which every block of consecutive queries reads a short list of keys, or several that follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .mechanism import traced

CPU_NUMBERS, NUMBERS = 3 << 19, 1 << 27  # that are temporary at a time in a forward pass: a CPU's must fit its cache


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    index: Tensor,
    run: int = 1,
    dropout: float = 0.0,
    joined: int = 1,
    skip: int = 0,
) -> Tensor:
    """softmax(q kᵀ / √D + bias) v over the keys that `index` lists for each block of queries.

    It goes some blocks at a time, so that what is temporary stays in the CPU's cache, and computes the weights again
    for the gradients: no tensor of size T·K is kept, unless weights are dropped.

    Args:
        q: queries (B, H, T, D), cut into blocks of b.
        k: keys (B, H, S, D).
        v: values (B, H, S, D).
        bias: (1 or B·H, N ≤ ⌈T/b⌉, b, K), added to the scores; block i reads row min(i, N − 1) of the second
            dimension. A query needs at least one key whose bias is finite.
        index: (1 or B·H, ⌈T/b⌉ + joined − 1, R), lists of runs of keys; one that is listed twice counts twice.
        run: consecutive keys that are listed together, a divisor of S: run r is the keys from r·run on.
        dropout: probability of dropping a weight.
        joined: lists that a block reads: block i reads K keys in a row of the lists i to i + joined − 1. Consecutive
            blocks then share lists, whose keys are fetched together.
        skip: keys at the start of its first list that a block does not read.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: if the lists of a block have fewer than skip + K keys.
    """
    if skip + bias.shape[3] > (listed := joined * index.shape[2] * run):
        raise ValueError(f"a block reads {bias.shape[3]} keys from key {skip} on, and its lists have {listed}")
    if traced():
        return _block_attention_at_once(q, k, v, bias, index, run, dropout, joined, skip)
    batch, heads, length, _ = q.shape
    first = torch.arange(batch * heads, device=q.device)[:, None, None] * (k.shape[2] // run)
    missing = -length % bias.shape[2]
    blocks = (F.pad(q, (0, 0, 0, missing)) if missing else q).flatten(0, 1).unflatten(1, (-1, bias.shape[2]))
    tables = (t.flatten(0, 1).unflatten(1, (-1, run)).flatten(2).flatten(0, 1) for t in (k, v))
    out = _BlockAttention.apply(blocks, *tables, bias, Lists(index, first, run, joined, skip), dropout)
    return out.flatten(1, 2)[:, :length].unflatten(0, (batch, heads))


def _block_attention_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    index: Tensor,
    run: int,
    dropout: float,
    joined: int,
    skip: int,
) -> Tensor:
    """`block_attention` in operations that a graph holds for any length, all blocks together."""
    batch, heads, length, width = q.shape
    size, count = bias.shape[2], index.shape[1] - joined + 1
    q = F.pad(q, (0, 0, 0, count * size - length)).reshape(batch * heads, count, size, width)
    listed = (index[..., None] * run + torch.arange(run, device=q.device)).flatten(2)
    listed = torch.cat([listed.narrow(1, i, count) for i in range(joined)], -1).narrow(2, skip, bias.shape[3])
    listed = listed.expand(batch * heads, -1, -1)
    keys, values = (
        t.flatten(0, 1)[torch.arange(batch * heads, device=q.device)[:, None, None], listed] for t in (k, v)
    )
    which = torch.arange(count, device=q.device).clamp(max=bias.shape[1] - 1)
    scores = q @ keys.mT * width**-0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias.index_select(1, which)
    weights = F.dropout(scores.softmax(-1), dropout).to(v.dtype)
    return (weights @ values).reshape(batch, heads, count * size, width)[:, :, :length]


class Piece(NamedTuple):
    """Heads and blocks that are computed together: all blocks of several heads, or some of one head's."""

    heads: slice
    blocks: slice

    @classmethod
    def cut(cls, heads: int, blocks: int, at_once: int, alone: bool) -> Iterator[Piece]:
        """Cuts heads × blocks into pieces of about `at_once` blocks, of one head each if they are to be `alone`."""
        many, parts = 1 if alone else max(1, at_once // blocks), math.ceil(blocks / max(1, at_once))
        size = math.ceil(blocks / parts)
        for head in range(0, heads, many):
            for block in range(0, blocks, size):
                yield cls(slice(head, min(head + many, heads)), slice(block, min(block + size, blocks)))

    def of(self, x: Tensor) -> Tensor:
        """The piece of x (G, N, ...) as (blocks, ...); shares its memory."""
        return x[self.heads, self.blocks].flatten(0, 1)

    def each_bias(self, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which of its blocks share the same bias, or have one each, and the bias (1 or heads, 1 or blocks, b, K)."""
        if bias.shape[0] > 1:
            bias = bias[self.heads]
        last, begin, end = bias.shape[1] - 1, self.blocks.start, self.blocks.stop
        if begin < last:
            yield slice(0, min(end, last) - begin), bias[:, begin : min(end, last)]
        if end > last:
            yield slice(max(0, last - begin), None), bias[:, last:]


class Workspace:
    """Memory for what a piece needs and the next one overwrites."""

    def __init__(self, like: Tensor):
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of arbitrary content; it shares memory with earlier ones of its name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """The products (n, ·, ·) of two batches of matrices, times a number."""
        out = self.take(name, *a.shape[:2], b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)

    def gathered(self, name: str, table: Tensor, rows: Tensor) -> Tensor:
        """These rows of a table."""
        return torch.index_select(table, 0, rows, out=self.take(name, rows.numel(), table.shape[1]))


class Lists(NamedTuple):
    """Which keys the blocks read: `index` and the numbers as in `block_attention`.

    Attributes:
        first: (G, 1, 1) where each head's runs begin in the tables (·, run·D) of keys and values.
    """

    index: Tensor
    first: Tensor
    run: int
    joined: int
    skip: int

    def of(self, piece: Piece) -> Tensor:
        """(lists, R) rows of the tables; only where each block has a list of its own are there several heads."""
        blocks = slice(piece.blocks.start, piece.blocks.stop + self.joined - 1)
        index = self.index if len(self.index) == 1 else self.index[piece.heads]
        return (index[:, blocks] + self.first[piece.heads]).flatten(0, 1)

    def gathered(self, space: Workspace, lists: Tensor, shape: tuple[int, int], **tables: Tensor) -> list[Tensor]:
        """What each block of a piece with these lists reads of the tables, (n, *shape) with shape (K, D)."""
        number, width = len(lists) - self.joined + 1, shape[1]
        rows, size = lists.flatten(), lists.shape[1] * self.run * width
        found = [space.gathered(name, table, rows) for name, table in tables.items()]
        return [each.as_strided((number, *shape), (size, width, 1), self.skip * width) for each in found]

    def add(self, total: Tensor, parts: Tensor, lists: Tensor) -> None:
        """Adds to a table what each block of a piece with these lists has for the keys that it reads, (n, K, D)."""
        size = lists.shape[1] * self.run
        if self.joined > 1 or parts.shape[1] < size:
            whole = parts.new_zeros(len(lists), size, parts.shape[2], dtype=total.dtype)
            for place in range(self.joined):
                begin, end = place * size - self.skip, (place + 1) * size - self.skip
                part = parts[:, max(0, begin) : end]
                whole[place : place + len(part), max(0, -begin) :][:, : part.shape[1]] += part
            parts = whole
        total.index_add_(0, lists.flatten(), parts.view(-1, total.shape[1]).to(total.dtype))


class _BlockAttention(torch.autograd.Function):
    """For q (G, N, b, D), tables of k and v (G·S / run, run·D), bias, and lists of the tables' rows."""

    @staticmethod
    def pieces(q: Tensor, bias: Tensor, lists: Lists) -> Iterator[Piece]:
        (heads, blocks, size, width), keys = q.shape, bias.shape[-1]
        numbers = CPU_NUMBERS if q.device.type == "cpu" else NUMBERS
        fetched = lists.index.shape[2] * lists.run
        return Piece.cut(heads, blocks, numbers // (keys * size + 2 * fetched * width), alone=lists.joined > 1)

    @staticmethod
    def weights(space: Workspace, queries: Tensor, keys: Tensor, bias: Tensor, piece: Piece) -> Tensor:
        """(n, b, K) attention weights, at least in float32."""
        scores = space.product("scores", queries, keys.mT, queries.shape[-1] ** -0.5)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        by_block = scores.unflatten(0, (-1, piece.blocks.stop - piece.blocks.start))
        for blocks, part in piece.each_bias(bias):
            by_block[:, blocks].add_(part)
        return torch.softmax(scores, -1, out=scores)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lists: Lists, dropout: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, space, kept, shape = torch.empty_like(q), Workspace(q), [], (bias.shape[-1], q.shape[-1])
        for piece in _BlockAttention.pieces(q, bias, lists):
            keys, values = lists.gathered(space, lists.of(piece), shape, keys=k, values=v)
            weights = _BlockAttention.weights(space, piece.of(q), keys, bias, piece)
            if dropout:
                kept.append(torch.rand_like(weights) >= dropout)
                weights = _drop(weights, kept[-1], dropout)
            torch.bmm(weights.to(v.dtype), values, out=piece.of(out))
        ctx.save_for_backward(q, k, v, bias, out, lists.index, lists.first)
        ctx.numbers, ctx.dropout, ctx.kept = lists[2:], dropout, kept
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, *lists = ctx.saved_tensors
        lists = Lists(*lists, *ctx.numbers)
        grad, space = grad.contiguous(), Workspace(q)
        scale = q.shape[-1] ** -0.5
        precise = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(t, dtype=precise) for t in (k, v))
        grad_bias = torch.zeros_like(bias, dtype=precise) if ctx.needs_input_grad[3] else None
        means = (grad * out).sum(-1, keepdim=True, dtype=precise)  # Σ_j weight · its gradient, of every query
        for number, piece in enumerate(_BlockAttention.pieces(q, bias, lists)):
            own, queries, grads = lists.of(piece), piece.of(q), piece.of(grad)
            keys, values = lists.gathered(space, own, (bias.shape[-1], q.shape[-1]), keys=k, values=v)
            weights = used = _BlockAttention.weights(space, queries, keys, bias, piece)
            grad_scores = space.product("gradients", grads, values.mT).to(precise)
            if ctx.dropout:
                used, grad_scores = (_drop(t, ctx.kept[number], ctx.dropout) for t in (weights, grad_scores))
            lists.add(grad_v, space.product("parts", used.to(q.dtype).mT, grads), own)
            grad_scores.sub_(piece.of(means)).mul_(weights)
            if grad_bias is not None:
                _add_bias(grad_bias, grad_scores, piece)
            grad_scores = grad_scores.to(q.dtype)
            lists.add(grad_k, space.product("parts", grad_scores.mT, queries), own)
            torch.bmm(grad_scores, keys, out=piece.of(grad_q))
        grad_k = grad_k.mul_(scale).to(k.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_q.mul_(scale), grad_k, grad_v.to(v.dtype), grad_bias, None, None


def _add_bias(total: Tensor, parts: Tensor, piece: Piece) -> None:
    """Adds parts (n, b, K) of a piece to a `total` that is shaped like the bias."""
    parts = parts.unflatten(0, (-1, piece.blocks.stop - piece.blocks.start))
    for blocks, target in piece.each_bias(total):
        target += parts[:, blocks].sum_to_size(target.shape)


def _drop(x: Tensor, kept: Tensor, probability: float) -> Tensor:
    return x * kept / (1 - probability)
