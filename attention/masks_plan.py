"""Which keys a combination of masks reads: candidates, what a set of them needs, and that as tables for the kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .mechanism import FARTHEST, blocks_for, traced

MOST = {"top": 1024, "induction": 64}  # the largest number in a candidate, where a query's columns grow with it
SMALLEST = {
    "last": (0,),
    "window": (1,),
    "first": (1,),
    "dilated": (1, 1),
    "causal": (),
    "top": (1,),
    "induction": (1,),
}
SYNTAX = "last(i), window(w), first(k), dilated(w, s), causal, top(n) or induction(n)"
CONTENT = ("top", "induction")  # kinds whose keys depend on the text
BLOCKS = (8, 16, 32, 64, 128)  # sizes of blocks of queries
LEAST_SHARED = 1024  # queries from which on it pays, on a CPU, that blocks share what they read: heads are done singly


class once:  # noqa: N801 - used like `property`
    """A property that is computed once, outside of inference mode: training may need its tensors later.

    While a graph is made it is computed each time, or tensors of that graph would be kept. It takes no lock, which a
    graph could not hold.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if traced():
            return self.function(instance)
        with torch.inference_mode(False):
            value = self.function(instance)
        instance.__dict__[self.name] = value
        return value


@dataclass(frozen=True)
class Candidate:
    """One mask: which keys j a query i may read.

    Attributes:
        kind: `last(i)`: the key exactly i back; `window(w)`: the last w keys, the query's own among them;
            `first(k)`: the first k keys; `dilated(w, s)`: w keys, every s-th back from the query's own; `causal`: all;
            `top(n)`: the n keys so far with the highest learned scores; `induction(n)`: the keys after the n latest
            earlier occurrences of the query's own token.
        numbers: what stands between the parentheses.
    """

    kind: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Reads the syntax of `MasksConfig.candidates`.

        Raises:
            ValueError: saying what is wrong with the text.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
        if not match or match[1] not in SMALLEST:
            raise ValueError(f"candidate {text!r} is unknown; write {SYNTAX}")
        kind, inside = match.groups()
        smallest = SMALLEST[kind]
        parts = [part.strip() for part in inside.split(",")] if inside and inside.strip() else []
        if len(parts) != len(smallest) or not all(re.fullmatch(r"-?\d+", part) for part in parts):
            raise ValueError(f"candidate {text!r} needs {len(smallest) or 'no'} whole number(s); write {SYNTAX}")
        numbers, most = tuple(map(int, parts)), MOST.get(kind, FARTHEST)
        for number, least in zip(numbers, smallest, strict=True):
            if not least <= number <= most:
                raise ValueError(f"candidate {text!r}: {number} must lie between {least} and {most}")
        candidate = cls(kind, numbers)
        if candidate.reach > FARTHEST + 1:
            raise ValueError(f"candidate {text!r} reaches {candidate.reach - 1} back; the most is {FARTHEST}")
        return candidate

    @property
    def name(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.numbers))})" if self.numbers else self.kind

    @property
    def reach(self) -> int:
        """One more than the largest distance at which this mask holds; 0 where distance does not matter."""
        match self.kind, self.numbers:
            case "last", (back,):
                return back + 1
            case "window", (width,):
                return width
            case "dilated", (width, step):
                return (width - 1) * step + 1
        return 0

    @property
    def distances(self) -> range:
        """The distances i − j at which this mask holds; none for `causal`, which holds at all."""
        match self.kind, self.numbers:
            case "last", (back,):
                return range(back, back + 1)
            case "dilated", (_, step):
                return range(0, self.reach, step)
        return range(self.reach)

    @property
    def sinks(self) -> int:
        """How many first keys this mask holds for."""
        return self.numbers[0] if self.kind == "first" else 0

    def at_distance(self, distance: Tensor) -> Tensor:
        """Whether the mask holds at a distance i − j (integers of any shape), by distance alone."""
        if self.kind == "causal":
            return distance >= 0
        near = (distance >= 0) & (distance < self.reach)
        if self.kind == "last":
            return near & (distance == self.reach - 1)
        return near & (distance % self.numbers[1] == 0) if self.kind == "dilated" else near

    def at_key(self, key: Tensor) -> Tensor:
        """Whether the mask holds at a key's position j (integers of any shape), by position alone."""
        return key < self.sinks


@dataclass(frozen=True)
class Shared:
    """How blocks of b queries share what they read: lists of b keys in a row and the sinks, which are fetched together.

    A block reads its own list, but for the sinks, and the ones before it, of which the first has the sinks it counts.

    Attributes:
        block: b.
        sinks: S.
        lead: how many keys before its first query a block reads; products are fastest in multiples of 8.
    """

    block: int
    sinks: int
    lead: int

    @classmethod
    def of(cls, block: int, sinks: int, reach: int) -> Shared:
        return cls(block, sinks, max(1, -(-(reach - 1) // 8)) * 8)

    @property
    def joined(self) -> int:
        """How many lists a block reads, 2 or more."""
        return 1 - (-self.lead // self.block)

    @property
    def skip(self) -> int:
        """How many keys of its first list a block does not read."""
        return (self.joined - 1) * self.block - self.lead

    @property
    def columns(self) -> int:
        """K, the keys that a block reads, sinks among them that do not count."""
        return self.lead + self.block + (self.joined - 1) * self.sinks

    def index(self, blocks: int, before: int, length: int, device: torch.device) -> Tensor:
        """(blocks + joined − 1, b + S) the lists of so many blocks; `before` and `length` as in `Layout.index`."""
        number = torch.arange(blocks + self.joined - 1, device=device)[:, None] - (self.joined - 1)
        near = before + number * self.block + torch.arange(self.block, device=device)
        sinks = torch.arange(self.sinks, device=device).expand(len(number), -1)
        return torch.cat([near, sinks], 1).clamp(0, length - 1)

    def order(self, band: list[int]) -> list[int]:
        """(K) the column, in the order of `Layout`, of each key that a block reads; the number after the last: none."""
        nowhere = self.sinks + len(band)
        columns = {place: self.sinks + i for i, place in enumerate(band)}
        order = []
        for number in range(1 - self.joined, 1):
            order += [columns.get(number * self.block + row, nowhere) for row in range(self.block)]
            order += range(self.sinks) if number == 1 - self.joined else [nowhere] * self.sinks
        return order[self.skip : len(order) - self.sinks]


@dataclass(frozen=True)
class Layout:
    """What a block of b queries reads: columns for the sinks first, then for the band of keys near it.

    A block's queries are consecutive, or `stride` apart where all distances are multiples of that: then they share
    most keys. Blocks go by their first query's position; b·stride consecutive queries make `stride` of them.

    Its tensors are made outside of inference mode, whatever the caller's: training may need them later.

    Attributes:
        block: queries b in a block.
        stride: from one query of a block to the next.
        relative: (U,) the band's keys, counted from the block's first query.
        distance: (b, S + U) i − j in the band; j for the sinks. A query at this position or later has that key.
        own: (b, S + U) whether a column of the band is the query's own key.
        candidates: (C, b·(S + U)) float: 1 where a candidate holds.
        active: (1 or H, C) float: 1 where a candidate counts.
        depth: the position from which on no query misses a key.
        shared: how blocks share what they read; None: each has its own list, in the order of the columns.
        order: (K) of `Shared.order`; None with it.
    """

    block: int
    stride: int
    relative: Tensor
    distance: Tensor
    own: Tensor
    candidates: Tensor
    active: Tensor
    reach: int
    depth: int
    shared: Shared | None
    order: Tensor | None

    @classmethod
    def make(cls, plan: Plan, block: int, shares: bool, device: torch.device) -> Layout:
        band = plan.band(block)
        relative = torch.tensor(band, device=device)
        shared = Shared.of(block, plan.sinks, plan.reach) if shares else None
        key = torch.arange(plan.sinks, device=device).expand(block, -1)
        distance = plan.stride * torch.arange(block, device=device)[:, None] - relative
        holds = [torch.cat([c.at_key(key), c.at_distance(distance)], 1) for c in plan.candidates]
        return cls(
            block=block,
            stride=plan.stride,
            relative=relative,
            distance=torch.cat([key, distance], 1),
            own=torch.cat([torch.zeros_like(key), distance == 0], 1).bool(),
            candidates=torch.stack(holds).flatten(1).float(),
            active=torch.tensor(plan.active, device=device).float(),
            reach=plan.reach,
            depth=plan.depth,
            shared=shared,
            order=None if shared is None else torch.tensor(shared.order(band), device=device),
        )

    @property
    def sinks(self) -> int:
        return self.distance.shape[1] - len(self.relative)

    def blocks(self, length: int) -> int:
        """How many blocks `length` queries make, the last ones perhaps not full."""
        return blocks_for(length, self.block * self.stride) * self.stride

    def starts(self, blocks: int) -> Tensor:
        """(blocks,) the first query of each block."""
        number = torch.arange(blocks, device=self.relative.device)
        return number // self.stride * (self.block * self.stride) + number % self.stride

    def by_block(self, x: Tensor) -> Tensor:
        """(B, H, T, D) in the order of the blocks, (B, H, blocks·b, D); only the last block may be short."""
        if self.stride == 1:
            return x
        length = x.shape[2]
        x = F.pad(x, (0, 0, 0, self.blocks(length) * self.block - length))
        return x.unflatten(2, (-1, self.block, self.stride)).transpose(3, 4).flatten(2, 4)

    def by_position(self, x: Tensor, length: int) -> Tensor:
        """The opposite of `by_block`, for T = `length`."""
        if self.stride == 1:
            return x
        return x.unflatten(2, (-1, self.stride, self.block)).transpose(3, 4).flatten(2, 4)[:, :, :length]

    def index(self, blocks: int, before: int | Tensor, length: int) -> Tensor:
        """(blocks, S + U) where the blocks find their keys in a buffer of `length` keys with the sinks at its start.

        Args:
            blocks: how many blocks.
            before: where in the buffer the key of the very first query stands; for (B, 1) of them the result is
                (B, blocks, S + U).
            length: keys in the buffer. Columns that lie outside of it are hidden and may point anywhere.
        """
        start = before + self.starts(blocks)
        sinks = torch.arange(self.sinks, device=start.device).expand(*start.shape, -1)
        return torch.cat([sinks, start[..., None] + self.relative], -1).clamp(0, length - 1)

    def lists(self, blocks: int, before: int, length: int) -> tuple[Tensor, int, int]:
        """The lists of keys of `block_attention`, how many each block reads, and how many keys it skips in them."""
        if self.shared is None:
            return self.index(blocks, before, length), 1, 0
        return self.shared.index(blocks, before, length, self.relative.device), self.shared.joined, self.shared.skip

    def in_lists(self, bias: Tensor) -> Tensor:
        """A bias (..., S + U) by column as one (..., K) by the keys of a block's lists, −∞ for those of no column."""
        return bias if self.order is None else F.pad(bias, (0, 1), value=-inf).index_select(-1, self.order)

    def read_at(self, position: int | Tensor) -> Tensor:
        """For b = 1: where the keys of a query stand, (S + U) or, for positions (B, 1, 1), (B, 1, S + U).

        Keys that are not there have any position that is.
        """
        if isinstance(position, int):
            place = torch.add(self.origin, self.moves, alpha=position)
            return place if position >= self.depth else place.clamp_(0, position)
        return (self.moves * position).add_(self.origin).clamp_(min=0).minimum(position)

    @once
    def origin(self) -> Tensor:
        """(S + U) the columns for a block at position 0."""
        return torch.cat([torch.arange(self.sinks, device=self.relative.device), self.relative])

    @once
    def moves(self) -> Tensor:
        """(S + U) 1 for columns that go with the block, 0 for the sinks."""
        return (torch.arange(len(self.origin), device=self.relative.device) >= self.sinks).long()

    @once
    def decode_index(self) -> Tensor | None:
        """For b = 1: the columns' places in a decode state; None if the columns are the whole state."""
        size = self.sinks + self.reach
        return None if self.distance.shape[1] == size else self.index(1, size - 1, size)[0]

    @once
    def read(self) -> Tensor:
        """(1 or H, b, S + U) whether a query that misses no key reads it."""
        return (self.active @ self.candidates > 0).view(-1, *self.distance.shape)

    @once
    def unread(self) -> Tensor:
        """(1 or H, b·(S + U)) float, the opposite of `read`."""
        return (~self.read).float().flatten(1)

    def hidden(self, start: Tensor, blocks: int, or_own: bool = True) -> Tensor:
        """(B, 1 or H, blocks, b, S + U): −∞ for keys that are not read or not there, else 0.

        Args:
            start: (B,) the position of the first query.
            blocks: how many blocks.
            or_own: whether a query that would read none of them reads its own key.
        """
        row = self.starts(blocks)[:, None] + self.stride * torch.arange(self.block, device=start.device)
        there = self.distance <= (start[:, None, None] + row)[..., None]
        read = self.read[:, None] & there[:, None]
        if or_own:
            read = read | (self.own & ~read.any(-1, keepdim=True))
        return torch.zeros(read.shape, device=read.device).masked_fill(~read, -inf)

    @once
    def hidden_at_start(self) -> Tensor:
        """(1, 1 or H, N, b, S + U) `hidden` for the blocks from position 0 on; from the last of them on, all equal."""
        return self.hidden(torch.zeros_like(self.relative[:1]), self.blocks(self.depth) + 1)

    @once
    def hidden_later(self) -> Tensor:
        """(1, 1 or H, 1, b, S + U) `hidden` for a block in which no query misses a key."""
        return self.hidden(torch.full_like(self.relative[:1], self.depth), 1)

    def log_mask(self, weights: Tensor) -> Tensor:
        """(1 or H, 1, b, S + U) log M for weights (1 or H, C); 0 where not read, so that gradients are finite."""
        with torch.autocast(weights.device.type, enabled=False):
            mask = torch.addmm(self.unread, weights * self.active, self.candidates)
        return mask.log().view(-1, 1, *self.distance.shape)


@dataclass
class Plan:
    """What the kernel computes for a set of active candidates; made on the host, once for each set.

    Attributes:
        candidates: all candidates of the config, in its order.
        active: for each head, or once for all that agree, whether each candidate counts.
        layouts: those made so far, by block size, whether blocks share what they read, and device.
    """

    candidates: list[Candidate]
    active: list[list[bool]]
    layouts: dict[tuple[int, bool, torch.device], Layout] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if all(row == self.active[0] for row in self.active):
            self.active = self.active[:1]

    def settle(self) -> Plan:
        """Finds out all that a graph may need to know; the plan itself."""
        needed = [name for name, each in vars(type(self)).items() if isinstance(each, once)]
        for name in ("softmax", "ranks", "top", "induction") if self.dense else needed:
            getattr(self, name)
        return self

    @once
    def used(self) -> list[Candidate]:
        """The candidates that count for some head."""
        return [c for c, *on in zip(self.candidates, *self.active, strict=True) if any(on)]

    @once
    def dense(self) -> bool:
        """Whether some head reads every key."""
        return any(c.kind == "causal" for c in self.used)

    @once
    def softmax(self) -> bool:
        """Whether every head's only candidate is `causal`: its weight cancels."""
        return self.dense and len(self.used) == 1 and len(self.active) == 1

    @once
    def ranks(self) -> dict[str, dict[int, int]]:
        """For each kind of mask whose keys depend on the text: place among the candidates and number of those used."""
        used = {index for index, on in enumerate(zip(*self.active, strict=True)) if any(on)}
        return {
            kind: {index: c.numbers[0] for index, c in enumerate(self.candidates) if c.kind == kind and index in used}
            for kind in CONTENT
        }

    @once
    def top(self) -> int:
        """How many of the highest-scored keys some head reads."""
        return max(self.ranks["top"].values(), default=0)

    @once
    def induction(self) -> int:
        """How many keys that follow earlier occurrences of its token a query reads in some head."""
        return max(self.ranks["induction"].values(), default=0)

    @property
    def by_content(self) -> bool:
        """Whether what some head reads depends on the text."""
        return self.top + self.induction > 0

    @once
    def distances(self) -> list[int]:
        """The distances i − j at which some head reads, unless `dense`."""
        return sorted(set().union(*(c.distances for c in self.used)))

    @once
    def offsets(self) -> list[int]:
        """The distances that the kernel computes: 0 among them, for queries whose support is empty."""
        return sorted({0, *self.distances})

    @once
    def stride(self) -> int:
        """What divides all distances: queries so far apart read the same keys, and come in blocks together."""
        return 1 if self.by_content else max(1, math.gcd(*self.offsets))

    @once
    def sinks(self) -> int:
        return max((c.sinks for c in self.used), default=0)

    @once
    def reach(self) -> int:
        """How many of the latest keys a decode state holds."""
        return self.offsets[-1] + 1

    @once
    def depth(self) -> int:
        """The position from which on no query misses a key and all sinks are in the past."""
        return max(self.reach - 1, self.sinks)

    @once
    def reads_at_once(self) -> bool:
        """Whether no query of any head has an empty support: each reads its own key, the first or the best."""
        at_once = [c.kind in ("causal", "top") or c.sinks > 0 or 0 in c.distances for c in self.candidates]
        return all(any(a and b for a, b in zip(on, at_once, strict=True)) for on in self.active)

    def band(self, block: int) -> list[int]:
        """The keys near a block that it reads, counted from its first query."""
        return sorted({row * self.stride - offset for row in range(block) for offset in self.offsets})

    def columns(self, block: int, shares: bool) -> int:
        """The keys that a block of queries reads: some for one of its queries only."""
        if shares:
            return Shared.of(block, self.sinks, self.reach).columns
        chosen = self.top + block if self.top else 0
        return self.sinks + len(self.band(block)) + chosen + block * self.induction

    def _cost(self, block: int, shares: bool) -> float:
        """What a query costs in blocks of this size: its columns, its part of fetching them and of a small product.

        The constants are fitted to times on CPUs with AVX2. Where the text decides, every query has a bias of its own,
        which costs about as much again as two products.
        """
        columns = self.columns(block, shares)
        if shares:
            return 1.3 * columns + (3 * (block + self.sinks) + 240) / block
        return (3 if self.by_content else 1) * columns + (16 * columns + 448) / block

    @once
    def _block(self) -> int:
        """The block size that costs least where each block has its own keys."""
        return min(BLOCKS, key=lambda block: self._cost(block, False))

    @once
    def _shared_block(self) -> int | None:
        """The block size that costs least where blocks share what they read; None if that does not pay."""
        if self.stride > 1 or self.by_content:
            return None
        block = min(BLOCKS, key=lambda block: self._cost(block, True))
        return block if self._cost(block, True) < self._cost(self._block, False) else None

    def cut(self, length: int, device: torch.device) -> tuple[int, bool]:
        """For `length` new queries: in blocks of which size they cost least, and whether these share what they read.

        They do on a CPU alone, and not in a graph. Blocks are no longer than the queries need, where that is known.
        """
        if traced():
            return self._block, False
        if length >= LEAST_SHARED and device.type == "cpu" and self._shared_block:
            return self._shared_block, True
        rows = -(-length // self.stride)
        return min(self._block, max(8, 1 << (rows - 1).bit_length())), False

    def layout(self, device: torch.device, block: int, shares: bool = False) -> Layout:
        """The layout for blocks of `block` queries."""
        if traced():  # what is made now belongs to the graph
            return Layout.make(self, block, shares, device)
        key = (block, shares, device)
        if key not in self.layouts:
            with torch.inference_mode(False):
                self.layouts[key] = Layout.make(self, *key)
        return self.layouts[key]
