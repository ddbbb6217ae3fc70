"""Decode states: what a layer remembers of the tokens before, as layers of a transformers `Cache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class State(CacheLayerMixin):
    """A layer's decode state.

    Attributes:
        batched: names of the attributes that hold a tensor, or None, with the batch as its first dimension; `lengths`
            is always one. They are what beams, repeats and selections of rows move about.
        seen: columns seen so far, padding included; no row has more tokens than that.
        lengths: (B,) tokens seen in each row, or None while every row has `seen` of them.
    """

    batched: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.lengths: Tensor | None = None

    @property
    def position(self) -> int | Tensor:
        """Where the next token of every row goes: one number while the rows agree, else (B,) numbers."""
        return self.seen if self.lengths is None else self.lengths

    def positions(self, batch_size: int, device: torch.device) -> Tensor:
        """(B,) the position of each row's next token."""
        if self.lengths is None:
            return torch.full((batch_size,), self.seen, device=device)
        return self.lengths

    def advance(self, columns: int, lengths: Tensor | None) -> None:
        """Counts `columns` new columns, of which `lengths` (B,) are real in each row (None: all)."""
        if lengths is not None and self.lengths is None:
            self.lengths = torch.full_like(lengths, self.seen)
        if self.lengths is not None:
            self.lengths = self.lengths + (columns if lengths is None else lengths)
        self.seen += columns

    def nbytes(self) -> int:
        """Bytes that the state holds, all rows."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in (*self.batched, "lengths")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, function(tensor))

    # What transformers asks of a cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a mechanism allocates what it needs on the first call."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the mechanism that owns the state takes them up itself."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        for name in self._tensors():
            setattr(self, name, None)
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} cannot be offloaded; use the default cache implementation")

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets nothing: a state that summarises cannot be unwound.

        Raises:
            NotImplementedError: unless `tokens_to_remove` is 0; assisted decoding needs a cache that can be cropped.
        """
        if tokens_to_remove:
            raise NotImplementedError(f"{type(self).__name__} cannot be cropped: assisted decoding is not supported")


def store(buffer: Tensor | None, new: Tensor, start: int | Tensor, needed: int) -> Tensor:
    """Writes tokens into a buffer that grows by doubling.

    Args:
        buffer: (B, H, C, D), or None for an empty one; written in place where it is large enough.
        new: (B, H, T, D).
        start: the position of the first new token, one for all rows or (B,) one for each.
        needed: the capacity needed, at least the largest start + T.

    Returns:
        The buffer (B, H, ≥ needed, D); what lies past the last written token is arbitrary and finite.
    """
    batch, heads, length, width = new.shape
    capacity = 0 if buffer is None else buffer.shape[2]
    if needed > capacity:
        grown = new.new_zeros(batch, heads, max(needed, 2 * capacity), width)
        if buffer is not None:
            grown[:, :, :capacity] = buffer
        buffer = grown
    if isinstance(start, int):
        buffer.narrow(2, start, length).copy_(new)
    else:
        index = (start[:, None] + torch.arange(length, device=new.device))[:, None, :, None]
        buffer.scatter_(2, index.expand_as(new), new)
    return buffer


class KeyValueState(State):
    """Keys and values of every token, by position, in preallocated buffers (B, H_kv, capacity, D)."""

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stores T new tokens and returns keys and values (B, H_kv, S, D) of positions 0 to S − 1.

        Rows shorter than S hold arbitrary finite values past their end.
        """
        start, needed = self.position, self.seen + k.shape[2]
        self.keys = store(self.keys, k, start, needed)
        self.values = store(self.values, v, start, needed)
        self.advance(k.shape[2], lengths)
        return self.keys[:, :, :needed], self.values[:, :, :needed]
