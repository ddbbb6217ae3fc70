"""Softmax attention in which every block of consecutive queries reads its own short list of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks of `size` queries that are computed together, as slices into what they need."""

    size: int
    rows: slice
    blocks: slice
    bias: slice

    @classmethod
    def cut(cls, length: int, block: int, biases: int, at_once: int) -> Iterator[Piece]:
        """Cuts `length` rows into pieces of at most `at_once` blocks, where block i has bias min(i, biases − 1).

        A last block that is shorter comes alone.
        """
        whole, start = length // block, 0
        while start < whole:
            stop = min(start + at_once, whole, biases - 1 if start < biases - 1 else whole)
            bias = slice(min(start, biases - 1), min(stop, biases))
            yield cls(block, slice(start * block, stop * block), slice(start, stop), bias)
            start = stop
        if rest := length % block:
            last = slice(biases - 1, biases)
            yield cls(rest, slice(whole * block, length), slice(whole, whole + 1), last)

    def queries(self, x: Tensor) -> Tensor:
        """Rows of (B, H, T, D) as blocks (B·H, blocks, size, D)."""
        return x[:, :, self.rows].unflatten(2, (-1, self.size)).flatten(0, 1)

    def keys(self, x: Tensor, index: Tensor) -> Tensor:
        """Keys or values (B, H, S, D), gathered for each block: (B·H, blocks, K, D)."""
        index = index[self.blocks]
        return x.index_select(2, index.flatten()).unflatten(2, index.shape).flatten(0, 1)

    def put(self, blocks: Tensor, out: Tensor) -> None:
        """Writes (B·H, blocks, size, D) to the rows of `out` (B, H, T, D)."""
        out[:, :, self.rows].unflatten(2, (-1, self.size)).copy_(blocks.unflatten(0, out.shape[:2]))

    def add(self, parts: Tensor, index: Tensor, total: Tensor) -> None:
        """Adds (B·H, blocks, K, D), which belong to the gathered keys, to `total` (B, H, S, D)."""
        parts = parts.to(total.dtype).flatten(1, 2).unflatten(0, total.shape[:2])
        total.index_add_(2, index[self.blocks].flatten(), parts)

    def weights(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """(B·H, blocks, K, size) attention weights, at least in float32, for a bias (1 or B·H, N, K, b).

        Keys come before queries: the products of small matrices that it takes are faster this way round.
        """
        scores = (keys @ queries.mT).to(_precise(queries.dtype)).mul_(queries.shape[-1] ** -0.5)
        return scores.add_(bias[:, self.bias, :, : self.size]).softmax(-2)


def block_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, index: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D + bias) v over the keys that `index` lists for each block of queries.

    It goes a few thousand rows at a time, so that the gathered keys stay in the CPU's cache, and computes the
    weights again for the gradients: no tensor of size T·K is kept, unless weights are dropped.

    Args:
        q: queries (B, H, T, D), cut into blocks of b.
        k: keys (B, H, S, D).
        v: values (B, H, S, D).
        bias: (1 or B·H, N ≤ ⌈T/b⌉, b, K), added to the scores; block i reads row min(i, N − 1) of the second
            dimension. A query needs at least one key whose bias is finite.
        index: (⌈T/b⌉, K), which keys each block reads; one that is listed twice counts twice.
        dropout: probability of dropping a weight.

    Returns:
        (B, H, T, D), laid out as (B, T, H, D): merging the heads copies nothing.
    """
    return _BlockAttention.apply(q, k, v, bias, index, dropout)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def pieces(q: Tensor, bias: Tensor) -> Iterator[Piece]:
        rows = 3072 if q.device.type == "cpu" else 1 << 17
        batch, heads, length, _ = q.shape
        block = bias.shape[2]
        return Piece.cut(length, block, bias.shape[1], max(1, rows // (batch * heads * block)))

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, index: Tensor, dropout: float) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, index)
        ctx.dropout, ctx.kept = dropout, []
        bias = bias.detach()  # with a gradient for the bias in sight, SDPA leaves its fast kernels
        batch, heads, length, width = q.shape
        out = v.new_empty(batch, length, heads, width).transpose(1, 2)
        for piece in _BlockAttention.pieces(q, bias):
            queries, keys, values = piece.queries(q), piece.keys(k, index), piece.keys(v, index)
            if dropout:
                weights = piece.weights(queries, keys, bias.mT)
                ctx.kept.append(torch.rand_like(weights) >= dropout)
                mixed = _drop(weights, ctx.kept[-1], dropout).to(v.dtype).mT @ values
            else:
                mixed = scaled_dot_product_attention(queries, keys, values, bias[:, piece.bias, : piece.size])
            piece.put(mixed, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, index = ctx.saved_tensors
        scale, bias_t = q.shape[-1] ** -0.5, bias.mT.contiguous()
        grad_q = torch.empty_like(q)
        grad_k, grad_v, grad_bias = (torch.zeros_like(t, dtype=_precise(t.dtype)) for t in (k, v, bias_t))
        for number, piece in enumerate(_BlockAttention.pieces(q, bias)):
            queries, keys, values = piece.queries(q), piece.keys(k, index), piece.keys(v, index)
            grads = piece.queries(grad)
            weights = used = piece.weights(queries, keys, bias_t)
            grad_weights = (values @ grads.mT).to(weights.dtype)
            if ctx.dropout:
                used, grad_weights = (_drop(t, ctx.kept[number], ctx.dropout) for t in (weights, grad_weights))
            mean = (grad_weights * weights).sum(-2, keepdim=True)
            grad_scores = grad_weights.sub_(mean).mul_(weights)
            target = grad_bias[:, piece.bias, :, : piece.size]
            target += grad_scores.sum_to_size(target.shape)
            grad_scores = grad_scores.mul_(scale).to(q.dtype)
            piece.put(grad_scores.mT @ keys, grad_q)
            piece.add(grad_scores @ queries, index, grad_k)
            piece.add(used.to(q.dtype) @ grads, index, grad_v)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias.mT.to(bias.dtype), None, None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _drop(x: Tensor, kept: Tensor, probability: float) -> Tensor:
    return x * kept / (1 - probability)
