"""Rows with padding, moved to the left so that every mechanism sees positions that start at 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How a padded batch is rolled: real tokens first, padding last.

    Attributes:
        lengths: (B,) real tokens of each row.
        order: (B, T) for each new column, the old one.
        inverse: (B, T) for each old column, the new one.
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
        return cls(lengths, (columns + first) % length, (columns - first) % length)

    def align(self, x: Tensor) -> Tensor:
        """(B, T, ...) with real tokens moved to the front."""
        return _take(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """(B, T, ...) back in the order of the mask."""
        return _take(x, self.inverse)


def _take(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.expand(index.shape[0], *x.shape[1:]).gather(1, index)
