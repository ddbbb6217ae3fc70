"""Rows with padding, and rows that hold several texts, laid out so that every mechanism sees positions from 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How a batch (B, T) is laid out anew as N rows of L tokens: one text a row, real tokens first, padding last.

    Attributes:
        lengths: (N,) real tokens of each new row.
        order: (N, L) for each new place, the old one, counted along the rows of the batch.
        inverse: (B, T) for each old place, the new one, counted along the new rows; a new row's last place for padding.
    """

    lengths: Tensor
    order: Tensor
    inverse: Tensor

    @classmethod
    def from_mask(cls, attention_mask: Tensor | None, length: int) -> Rows | None:
        """Reads the last `length` columns of a mask (B, ≥ T), 1 or True for real tokens; None if all are real.

        Raises:
            ValueError: if the mask is not two-dimensional, or real tokens of a row are not side by side.
        """
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be (batch, length); got {tuple(attention_mask.shape)}")
        real = attention_mask[:, -length:].bool()
        if real.all():
            return None
        columns = torch.arange(length, device=real.device)
        first, lengths = real.int().argmax(1, keepdim=True), real.sum(1)
        if (real != ((columns >= first) & (columns < first + lengths[:, None]))).any():
            raise ValueError("attention_mask has padding between real tokens; pad on the left or on the right only")
        starts = length * torch.arange(len(real), device=real.device)[:, None]
        return cls(lengths, (columns + first) % length + starts, (columns - first) % length + starts)

    @classmethod
    def from_positions(cls, position_ids: Tensor) -> Rows | None:
        """Splits rows (B, T) without padding where the positions do not count on; None if they do everywhere."""
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff() != 1
        if not begins[:, 1:].any():
            return None
        first = begins.flatten().nonzero().squeeze(1)
        lengths = torch.cat([first[1:], first.new_tensor([begins.numel()])]) - first
        columns = torch.arange(int(lengths.max()), device=first.device)
        order = (first[:, None] + columns).clamp_(max=begins.numel() - 1)
        number = begins.flatten().cumsum(0) - 1
        inverse = number * len(columns) + torch.arange(begins.numel(), device=first.device) - first[number]
        return cls(lengths, order, inverse.view_as(begins))

    def align(self, x: Tensor) -> Tensor:
        """(B or 1, T, ...) in the new rows (N, L, ...)."""
        return x.expand(self.inverse.shape[0], *x.shape[1:]).flatten(0, 1)[self.order]

    def restore(self, x: Tensor) -> Tensor:
        """(N, L, ...) in the order of the batch (B, T, ...)."""
        return x.flatten(0, 1)[self.inverse]

    def restore_maps(self, maps: Tensor) -> Tensor:
        """(N, H, L, L) maps as (B, H, T, T), zero between tokens of different texts."""
        row, place = self.inverse // maps.shape[-1], self.inverse % maps.shape[-1]
        found = maps[row[:, :, None], :, place[:, :, None], place[:, None]].permute(0, 3, 1, 2)
        return found.masked_fill((row[:, :, None] != row[:, None])[:, None], 0.0)

    def real(self, x: Tensor, fill: int) -> Tensor:
        """(N, L) with `fill` in the places of padding."""
        return x.masked_fill(torch.arange(x.shape[1], device=x.device) >= self.lengths[:, None], fill)
