"""Decode states: what a layer remembers of the tokens before, as layers of a transformers `Cache`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

LONG = 1 << 30  # tokens that a resumed state says it has seen: more than any state asks for
LEAST_GROWTH = 64  # tokens


class Block(NamedTuple):
    """Tokens that a state took in at once.

    Attributes:
        columns: T, how many in the longest row.
        lengths: (B,) how many are real, the first ones; None: all.
        tensors: what the state needs to take them in again, (B, ·, T, ...) each.
    """

    columns: int
    lengths: Tensor | None
    tensors: tuple[Tensor, ...]

    def first(self, columns: int) -> Block:
        """The block without its last columns, which hold tokens in every row that has any left."""
        gone = self.columns - columns
        lengths = None if self.lengths is None else (self.lengths - gone).clamp(min=0)
        return Block(columns, lengths, tuple(t[:, :, :columns] for t in self.tensors))

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        """The block with a function applied to every tensor."""
        lengths = None if self.lengths is None else function(self.lengths)
        return Block(self.columns, lengths, tuple(map(function, self.tensors)))


@dataclass
class Record:
    """What a state keeps so that tokens can be taken back from it.

    Attributes:
        before: the state's attributes at the beginning, by name: all that taking in tokens changes for good.
        blocks: what came since.
        closed: whether tokens were taken back; the next ones begin another record.
    """

    before: dict[str, Any]
    blocks: list[Block] = field(default_factory=list)
    closed: bool = False

    @property
    def columns(self) -> int:
        return sum(block.columns for block in self.blocks)

    def forget(self, count: int) -> None:
        """Drops the last columns, of which there must be so many."""
        while count >= self.blocks[-1].columns:
            count -= self.blocks.pop().columns
            if not self.blocks:
                return
        if count:
            self.blocks[-1] = self.blocks[-1].first(self.blocks[-1].columns - count)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held: list[Any] = [*self.before.values()]
        for block in self.blocks:
            held += [block.lengths, *block.tensors]
        return [value for value in held if isinstance(value, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor."""
        self.before = {name: function(v) if isinstance(v, Tensor) else v for name, v in self.before.items()}
        self.blocks = [block.map(function) for block in self.blocks]


class State(CacheLayerMixin):
    """A layer's decode state.

    Attributes:
        batched: names of the attributes that hold a tensor, or None, with the batch as its first dimension; `lengths`
            is always one. They are what beams, repeats and selections of rows move about.
        summarised: names of the attributes in which tokens cannot be told apart any more once they were taken in.
        seen: columns seen so far, padding included; no row has more tokens than that.
        lengths: (B,) tokens seen in each row, or None while every row has `seen` of them.
        least: tokens that every row is known to have.
        known: a tensor that `lengths` was, and its numbers; those of `lengths` while it is that tensor.
        record_past: whether a record is kept, from the next tokens on, so that `crop` can take them back. Nobody who
            does not ask for it pays for it.
        record: of the tokens since the last crop.
    """

    batched: ClassVar[tuple[str, ...]] = ("keys", "values")
    summarised: ClassVar[tuple[str, ...]] = ()
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.lengths: Tensor | None = None
        self.least = 0
        self.known: tuple[Tensor | None, list[int]] = (None, [])
        self.record_past = False
        self.record: Record | None = None

    @property
    def position(self) -> int | Tensor:
        """Where the next token of every row goes: one number while the rows agree, else (B,) numbers."""
        return self.seen if self.lengths is None else self.lengths

    def positions(self, batch_size: int, device: torch.device) -> Tensor:
        """(B,) the position of each row's next token."""
        if self.lengths is None:
            return torch.full((batch_size,), self.seen, device=device)
        return self.lengths

    def numbers(self) -> list[int]:
        """`lengths` as numbers, which need not be fetched from the device for every token."""
        if self.known[0] is not self.lengths:
            self.known = self.lengths, self.lengths.tolist()
        return self.known[1]

    def advance(self, columns: int, lengths: Tensor | None) -> None:
        """Counts `columns` new columns, of which `lengths` (B,) are real in each row (None: all)."""
        if lengths is not None and self.lengths is None:
            self.lengths = torch.full_like(lengths, self.seen)
        if self.lengths is not None:
            before, self.lengths = self.lengths, self.lengths + (columns if lengths is None else lengths)
            if lengths is None and self.known[0] is before:
                self.known = self.lengths, [number + columns for number in self.known[1]]
        self.seen += columns
        self.least += columns if lengths is None else int(lengths.min())

    def resume(self, steady: dict[str, Tensor]) -> None:
        """Makes an empty state the one that `Mechanism.steady` gave these tensors of."""
        for name, tensor in steady.items():
            setattr(self, name, tensor)
        self.seen = self.least = LONG

    def nbytes(self) -> int:
        """Bytes that the state holds, all rows."""
        held = [*self._tensors().values(), *(self.record.tensors() if self.record else [])]
        return sum(t.numel() * t.element_size() for t in held)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in (*self.batched, "lengths")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, function(tensor))
        if self.record is not None:
            self.record.map(function)

    def leave_inference_mode(self) -> None:
        """Copies what was made in inference mode, as it cannot be written outside of it."""
        if any((t := getattr(self, name)) is not None and t.is_inference() for name in (*self.batched, "lengths")):
            self._map(torch.clone)

    # Taking tokens back.

    def note(self, columns: int, lengths: Tensor | None, *tensors: Tensor) -> None:
        """Puts tokens that are about to be taken in on record, if one is kept; see `Block`."""
        if not self.record_past:
            self.record = None
            return
        if self.record is None or self.record.closed:
            names = ("seen", "lengths", "least", *self.summarised)
            self.record = Record({name: _copied(getattr(self, name)) for name in names})
        self.record.blocks.append(Block(columns, lengths, tensors))

    def rewind(self) -> list[Block]:
        """Puts the state back to the beginning of its record; what is to be taken in again."""
        for name, value in self.record.before.items():
            setattr(self, name, _copied(value))
        return self.record.blocks

    def can_remove(self, count: int) -> bool:
        """Whether the last columns, so many and not all, can be taken back."""
        return self.record is not None and count <= self.record.columns

    def remove(self, count: int) -> None:
        """Takes back the last columns, so many and not all; `can_remove` must hold."""
        if self.record is not None and count <= self.record.columns:
            self.record.forget(count)
        else:
            self.record = None
        self.seen -= count
        self.least = max(0, self.least - count)
        if self.lengths is not None:
            self.lengths = (self.lengths - count).clamp(min=0)

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
        self.seen, self.least, self.record = 0, 0, None

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

    def activate_past_recording(self) -> None:
        """Has the state remember what it takes in from now on, each time until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last columns of every row.

        Args:
            tokens_to_remove: how many, as a negative number. After 0, as after any other, only what comes later can
                be taken back.

        Raises:
            ValueError: if they cannot be taken back; the state is as it was.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        if problem := crop_problem([self], tokens_to_remove):
            raise ValueError(problem)
        if tokens_to_remove and -tokens_to_remove == self.seen:
            self.reset()
        elif tokens_to_remove:
            self.remove(-tokens_to_remove)
        if self.record is not None:
            self.record.closed = True


def _copied(value: Any) -> Any:
    """A tensor's copy, which may be written into; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def crop_problem(states: list[State], tokens_to_remove: int) -> str | None:
    """Why tokens cannot be taken back from states of one length, in a sentence; None if they can."""
    if tokens_to_remove > 0:
        return f"crop takes how many tokens to remove as a negative number; got {tokens_to_remove}"
    count, seen = -tokens_to_remove, states[0].seen if states else 0
    if count > seen:
        return f"{count} tokens cannot be removed from a cache of {seen}"
    if count in (0, seen) or all(state.can_remove(count) for state in states):
        return None
    refusing = next(state for state in states if not state.can_remove(count))
    if refusing.record is None:
        return (
            f"{count} tokens cannot be removed: a {type(refusing).__name__} keeps a summary of its tokens. Call "
            "activate_past_recording() on the cache before the tokens that may have to be removed"
        )
    return (
        f"{count} tokens cannot be removed: a {type(refusing).__name__} keeps a summary of its tokens, and a record of "
        f"those since the last crop only, which are {refusing.record.columns}"
    )


class StateCache(Cache):
    """The decode states of a model's layers; a crop that one of them must refuse changes none.

    Attributes:
        fixed: columns that cannot be removed, since not all rows end with a token there.
    """

    def __init__(self, layers: list[State]):
        super().__init__(layers=layers)
        self.fixed = 0

    def reset(self) -> None:
        super().reset()
        self.fixed = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last columns of every row; see `State.crop`.

        Raises:
            ValueError: if they cannot be taken back; the cache is as it was.
        """
        tokens_to_remove = int(tokens_to_remove)
        states = [state for state in self.layers if state.seen]  # those above an early exit have seen nothing
        left = states[0].seen + tokens_to_remove if states else 0
        problem = crop_problem(states, tokens_to_remove)
        if problem is None and tokens_to_remove and 0 < left < self.fixed:
            problem = f"only what came after the first {self.fixed} columns can be removed: rows have padding there"
        if problem is not None:
            raise ValueError(problem)
        for state in states:
            state.crop(tokens_to_remove)
        self.fixed = min(self.fixed, left)


def store(buffer: Tensor | None, new: Tensor, start: int | Tensor, needed: int, step: int = 1) -> Tensor:
    """Writes tokens into a buffer, which grows as in `with_room`.

    Args:
        buffer: (B, H, C, D), or None for an empty one; written in place where it is large enough and `writable`.
        new: (B, H, T, D).
        start: the position of the first new token, one for all rows or (B,) one for each.
        needed: the capacity needed, at least the largest start + T.
        step: the capacity is a multiple of it.

    Returns:
        The buffer (B, H, ≥ needed, D); what lies past the last written token is arbitrary and finite.
    """
    length = new.shape[2]
    buffer = writable(with_room(buffer, new, needed, step), new)
    if isinstance(start, int):
        buffer.narrow(2, start, length).copy_(new)
    else:
        index = (start[:, None] + torch.arange(length, device=new.device))[:, None, :, None]
        buffer.scatter_(2, index.expand_as(new), new)
    return buffer


def writable(buffer: Tensor, new: Tensor) -> Tensor:
    """A buffer that `new` may be written into: a copy where gradients need it as it is."""
    kept = torch.is_grad_enabled() and (buffer.requires_grad or new.requires_grad)
    return buffer.clone() if kept else buffer


def with_room(buffer: Tensor | None, like: Tensor, needed: int, step: int = 1) -> Tensor:
    """A buffer (B, H, C, D), None for an empty one, or a larger copy if C < `needed`.

    It grows by an eighth, but by 64 at the least: each token is then copied some eight times on average, where a cache
    that is concatenated copies it once for each token after it; doubled, half of a long text's memory could be empty.

    Args:
        like: (B, H, ·, D), of whose shape, dtype and device the first one is.
        step: the capacity is a multiple of it.
    """
    capacity = 0 if buffer is None else buffer.shape[2]
    if needed <= capacity:
        return buffer
    batch, heads, _, width = like.shape
    room = capacity and capacity + max(LEAST_GROWTH, capacity // 8)
    grown = like.new_zeros(batch, heads, -(-max(needed, room) // step) * step, width)
    if buffer is not None:
        grown[:, :, :capacity] = buffer
    return grown


class KeyValueState(State):
    """Keys and values of every token, by position, in preallocated buffers (B, H_kv, capacity, D)."""

    def can_remove(self, count: int) -> bool:
        return True  # what lies behind the last token is overwritten

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stores T new tokens and returns keys and values (B, H_kv, S, D) of positions 0 to S − 1.

        Rows shorter than S hold arbitrary finite values past their end.
        """
        start, needed = self.position, self.seen + k.shape[2]
        self.keys = store(self.keys, k, start, needed)
        self.values = store(self.values, v, start, needed)
        self.advance(k.shape[2], lengths)
        return self.keys[:, :, :needed], self.values[:, :, :needed]
