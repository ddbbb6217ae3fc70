"""Kernels of performer: causal sums in chunks, softmax over a window, and the features that they work on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mechanism import blocks_for, traced, writes_in_place

LOG2_E = 1 / math.log(2)
LEAST_LOG = -200.0  # of a factor that is 0 in float32, and yet a number


def exp_(x: Tensor) -> Tensor:
    """exp of many numbers, in place; by exp2, for which PyTorch has vector code on CPUs where its exp has not."""
    return x.mul_(LOG2_E).exp2_()


def running_maximum(x: Tensor) -> Tensor:
    """The largest of (B, H, N, m) up to each place of the third dimension."""
    if not traced():
        return x.cummax(2).values
    place = torch.arange(x.shape[2], device=x.device)
    later = (place > place[:, None])[..., None]
    return x[:, :, None].masked_fill(later, -torch.inf).amax(3)


class Steps(NamedTuple):
    """Which of a segment's T steps are real, and how they are cut into N chunks of C.

    Attributes:
        length: T.
        size: C.
        missing: how many of a row's first keys are empty, one number or (B,).
        lengths: (B,) how many steps of each row are real, the first ones; None: all.
    """

    length: int
    size: int
    missing: int | Tensor = 0
    lengths: Tensor | None = None

    @property
    def chunks(self) -> int:
        """N."""
        return blocks_for(self.length, self.size)

    def padded(self, x: Tensor) -> Tensor:
        """(B, H, T, ·) as (B, H, N C, ·), with zeros at the end; what has more than T gets as many zeros more."""
        padding = self.chunks * self.size - self.length
        return F.pad(x, (0, 0, 0, padding)) if traced() or padding else x

    def chunked(self, x: Tensor) -> Tensor:
        """(B, H, N C, ·) as (B, H, N, C, ·)."""
        return x.unflatten(2, (self.chunks, self.size))

    def joined(self, x: Tensor) -> Tensor:
        """(B, H, N, C, ...) as (B, H, T, ...)."""
        x = x.flatten(2, 3)
        return x[:, :, : self.length] if traced() or x.shape[2] != self.length else x

    def real(self, k: Tensor, fill: float) -> Tensor:
        """(B, H, N, C, m) with `fill` in place of what belongs to keys that do not count."""
        start, stop = self.missing, self.length if self.lengths is None else self.lengths
        whole = not isinstance(start, Tensor) and not start and self.lengths is None
        if whole and not traced() and not stop % self.size:
            return k
        start, stop = (t[:, None] if isinstance(t, Tensor) else t for t in (start, stop))
        slots = torch.arange(k.shape[2] * self.size, device=k.device)
        hidden = (slots < start) | (slots >= stop)
        return k.masked_fill(hidden.view(-1, 1, k.shape[2], self.size, 1), fill)

    def counts(self, device: torch.device) -> Tensor:
        """(1 or B, 1, N or 1, 1, 1) how many steps are real in each chunk; one number where all are full."""
        if self.lengths is None and not traced() and not self.length % self.size:
            return torch.full((1, 1, 1, 1, 1), float(self.size), device=device)
        starts = self.size * torch.arange(self.chunks, device=device)[:, None, None]
        lengths = self.length if self.lengths is None else self.lengths[:, None, None, None, None]
        return (lengths - starts).clamp(0, self.size).float().view(-1, 1, self.chunks, 1, 1)


class Scaled(NamedTuple):
    """Features in chunks, each on the scale of its chunk, and how the sums over keys change scale between chunks.

    Attributes:
        q: (B, H, N, C, m).
        top: (B, H, N, C, 1) logs of what the features of each query were divided by.
        k: (B, H, N, C, m).
        entry: (·, H, 1, m) factor of the state's sums before the first chunk, or None for 1.
        factors: (·, H, N, 1, m) factors of the sums after each chunk, or None for 1.
        exit: (H, 1, m) factor of the sums that go into the state, or None for 1.
    """

    q: Tensor
    top: Tensor
    k: Tensor
    entry: Tensor | None = None
    factors: Tensor | None = None
    exit: Tensor | None = None


class ScaledOne(NamedTuple):
    """As `Scaled`, for one token, without dimensions N and C.

    Attributes:
        q_log: (B, H, 1, m) logs of the query's features; only their differences count where there is no window.
        k: (B, H, 1, m).
        entry: (·, H, 1, m) factor of the state's sums before the key is added, or None for 1.
        exit: (H, 1, m) factor of the sums after the query has read them, or None for 1.
    """

    q_log: Tensor
    k: Tensor
    entry: Tensor | None = None
    exit: Tensor | None = None


def rescaled(sums: Tensor, factor: Tensor | None) -> Tensor:
    """Sums (..., D, m), feature by feature times a factor (..., 1, m), None for 1."""
    return sums if factor is None else sums * factor


def linear_chunks(scaled: Scaled, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Causal sums in chunks: O_c = tril(Q_c K_cᵀ) V_c + Q_c Sᵀ, then S ← (S + V_cᵀ K_c) · factor_c.

    Args:
        scaled: features.
        v: (B, H, N, C, D).
        sums: S (B, H, D, m) before the first chunk.

    Returns:
        (B, H, N, C, D), and `sums` after the last chunk.
    """
    shape, factors = v.shape[:3], scaled.factors
    q, k, v = (t.flatten(0, 2) for t in (scaled.q, scaled.k, v))
    added = rescaled((v.mT @ k).unflatten(0, shape), factors)
    before, after = (_sums_at_once if traced() else _running_sums)(added, sums, factors)
    inside = (q @ k.mT).tril_()
    out = (q @ before.flatten(0, 2).mT).baddbmm_(inside, v)
    return out.unflatten(0, shape), after


def _sums_at_once(added: Tensor, sums: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_running_sums` in operations that a graph holds for any number of chunks.

    S before chunk c is Σ_j added_j · Π_{j < i < c} factor_i: the logs of the factors add up, and with a row for each c
    the sum is one product. The sums before the first chunk are those after a chunk before it.
    """
    added = torch.cat([sums[:, :, None], added], 2)
    if factors is None:
        all_sums = added.cumsum(2)
        return all_sums[:, :, :-1], all_sums[:, :, -1]
    logs = factors.squeeze(-2).log().clamp(min=LEAST_LOG)
    logs = F.pad(logs.cumsum(2), (0, 0, 1, 0))  # (·, H, N + 1, m)
    place = torch.arange(added.shape[2], device=added.device)
    later = (place[:, None] >= place)[..., None]
    weights = (logs[:, :, :, None] - logs[:, :, None]).masked_fill(~later, -torch.inf).exp()
    all_sums = (weights.permute(0, 1, 4, 2, 3) @ added.permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2)
    return all_sums[:, :, :-1], all_sums[:, :, -1]


def _running_sums(added: Tensor, sums: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """S before each chunk (B, H, N, D, m) and after the last, where S ← S · factor + added (B, H, N, D, m)."""
    added = added.unbind(2)
    if not writes_in_place():
        before = []
        for chunk, new in enumerate(added):
            before.append(sums)
            sums = sums + new if factors is None else torch.addcmul(new, sums, factors[:, :, chunk])
        return torch.stack(before, 2), sums
    before, after = sums.new_empty(*sums.shape[:2], len(added), *sums.shape[2:]), torch.empty_like(sums)
    slots = [*before.unbind(2), after]
    slots[0].copy_(sums)
    for chunk, new in enumerate(added):
        old, target = slots[chunk : chunk + 2]
        if factors is None:
            torch.add(old, new, out=target)
        else:
            torch.addcmul(new, old, factors[:, :, chunk], out=target)
    return before, after


def window_attention(
    q: Tensor, keys: Tensor, values: Tensor, window: int, missing: int | Tensor, block: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of query t over keys t + 1 to t + w, in blocks of queries.

    Args:
        q: (B, H, T, D).
        keys, values: (B, H, w + T, D), the w before the first query in front.
        window: w.
        missing: how many of a row's first keys are empty, one number or (B,).
        block: queries in a block.
        dropout: of the weights.

    Returns:
        (B, H, T, D), the logs of the normalisers (B, H, T), and the mean scores (B, H, T).
    """
    steps = Steps(q.shape[2], block if traced() else min(block, q.shape[2]))
    q = steps.chunked(steps.padded(q * q.shape[-1] ** -0.5))
    span = window + steps.size
    keys, values = (_spans(steps.padded(t), span, steps) for t in (keys, values))  # (B, H, N, D, span)
    outside = ~_in_window(q, window, missing)
    scores = q @ keys
    mean = scores.masked_fill(outside, 0.0).sum(-1) / (span - outside.sum(-1))
    scores = scores.masked_fill(outside, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = exp_(scores - top)
    total = weights.sum(-1, keepdim=True)
    mixed = F.dropout(weights, dropout) @ values.mT / total
    logs = (top + total.log()).squeeze(-1)
    return steps.joined(mixed), steps.joined(logs), steps.joined(mean)


def _spans(x: Tensor, span: int, steps: Steps) -> Tensor:
    """(B, H, N, D, span) what each chunk of queries reads of (B, H, ·, D), each a chunk further."""
    if not traced():
        return x.unfold(2, span, steps.size)
    starts = steps.size * torch.arange(steps.chunks, device=x.device)[:, None]
    return x[:, :, starts + torch.arange(span, device=x.device)].mT


def _in_window(q: Tensor, window: int, missing: int | Tensor) -> Tensor:
    """(·, 1, N or 1, block, span) which of its block's keys a query may read, for q (B, H, N, block, D)."""
    number, block = q.shape[2:4]
    slots, rows = torch.arange(window + block, device=q.device), torch.arange(block, device=q.device)[:, None]
    near = (slots > rows) & (slots <= rows + window)
    if not isinstance(missing, Tensor):
        if not missing:
            return near[None, None, None]
        missing = torch.full((1,), missing, device=q.device)
    position = slots + block * torch.arange(number, device=q.device)[:, None]
    return near & (position >= missing[:, None, None])[:, None, :, None]
