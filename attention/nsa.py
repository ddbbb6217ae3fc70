"""Native sparse attention: compressed, selected and sliding-window branches, mixed by gates (arXiv 2502.11089).

The paper's symbols: l = `compress_block`, d = `compress_stride`, l' = `select_block`, n = `num_selected`, w = `window`.
Positions and blocks count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from .mechanism import (
    FARTHEST,
    LARGEST_SEED,
    LayerShape,
    Mechanism,
    MechanismConfig,
    blocks_for,
    repeat_heads,
    seeded_generator,
    traced,
)
from .nsa_kernel import (
    choose_blocks,
    compressed_branch,
    gather_blocks,
    masked_attention,
    row_masks,
    selected_branch,
    selection_scores,
    take,
    take_from,
    token_masks,
    window_branch,
)
from .reference import (
    nsa_compression,
    nsa_selected_blocks,
    nsa_selection_scores,
    nsa_visible,
    nsa_window,
    visible_weights,
)
from .state import State, store, with_room, writable

BRANCHES = ("compressed", "selected", "window")
SEGMENT = 2048  # queries whose branches exist at the same time, unless gradients are kept
CHUNK = 512  # queries whose weights in the compressed branch exist at the same time
LEADERS = 64  # the same, of those whose weights are needed to choose blocks
GROUP = 8  # spans that φ averages by one matrix product
OF_ROWS = (-1, 0, 0, True)  # the layout of what is read where rows differ in position
FORCED = 3  # blocks that are always read: the first one, the one before the query's, the query's own
MOST = {"select_block": 4096, "num_selected": 1024, "window": FARTHEST, "mlp_width": 4096}
LARGEST_NETWORK = 2**18  # l times the width of φ, whose first layer has D times as many weights a head

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class NSAConfig(MechanismConfig):
    """Sizes of the three branches, and how they start.

    Attributes:
        compress_block: l, tokens summarised by one compressed key and value.
        compress_stride: d, tokens from the start of a compressed block to the start of the next; divides l and l'.
        select_block: l', tokens of a block that is read or skipped as a whole; at least l.
        num_selected: n, blocks read by the selected branch, of which three are always read: the first one, the one
            before the query's and the query's own.
        window: w, latest keys read by the window branch, the query's own included.
        select_every: consecutive queries that share the blocks chosen for the first of them; divides l'. 1 is the
            paper's choice for every query; larger is faster.
        separate_kv: give each branch its own linear map of keys and of values, identity at the start.
        mlp_width: hidden units of φ, the network that compresses a block.
        compressed_gate, selected_gate, window_gate: the gates at the start, between 0 and 1.
        seed: of φ's first layer, the only random start.
    """

    method: ClassVar[str] = "nsa"
    description: ClassVar[str] = (
        "Every token reads the latest tokens, a few earlier blocks that it picks, and short summaries of all the rest."
    )

    compress_block: int = 32
    compress_stride: int = 32
    select_block: int = 32
    num_selected: int = 8
    window: int = 32
    select_every: int = 16
    separate_kv: bool = False
    mlp_width: int = 32
    compressed_gate: int | float = 0.05
    selected_gate: int | float = 0.35
    window_gate: int | float = 0.6
    seed: int = 0

    def problems(self) -> list[str]:
        sizes = ("compress_block", "compress_stride", "select_block", "window", "select_every", "mlp_width")
        found = [f"{name} is {getattr(self, name)}; expected at least 1" for name in sizes if getattr(self, name) < 1]
        if self.num_selected < FORCED:
            found.append(f"num_selected is {self.num_selected}; expected at least {FORCED}, the blocks always read")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                found.append(f"{name} is {getattr(self, name)}; expected at most {most}")
        if self.compress_block * self.mlp_width > LARGEST_NETWORK:
            found.append(
                f"compress_block times mlp_width is {self.compress_block * self.mlp_width}; expected at most "
                f"{LARGEST_NETWORK}"
            )
        if self.compress_block > self.select_block:
            found.append(f"compress_block is {self.compress_block}; expected at most select_block={self.select_block}")
        for part, whole in (
            ("compress_stride", "compress_block"),
            ("compress_stride", "select_block"),
            ("select_every", "select_block"),
        ):
            divisor, number = getattr(self, part), getattr(self, whole)
            if divisor > 0 and number % divisor:
                found.append(f"{part} is {divisor}; expected a divisor of {whole}={number}")
        for name in BRANCHES:
            if not 0 < (gate := getattr(self, f"{name}_gate")) < 1:
                found.append(f"{name}_gate is {gate}; expected a number between 0 and 1, both excluded")
        if not 0 <= self.seed <= LARGEST_SEED:
            found.append(f"seed is {self.seed}; expected a number between 0 and {LARGEST_SEED}")
        return found

    def build(self, layer: LayerShape) -> NativeSparseAttention:
        return NativeSparseAttention(self, layer)

    def visible(self, position: Index) -> Index:
        """How many compressed blocks a query at `position` sees: block i from i·d + l − 1 ≤ position on."""
        count = (position + 1 - self.compress_block) // self.compress_stride + 1
        return count.clamp(min=0) if isinstance(count, Tensor) else max(count, 0)

    def reads_others(self, position: int) -> bool:
        """Whether a token reads other blocks than the one before it: its group chooses, or finds one more to read."""
        all_are_read = position // self.select_block < self.num_selected
        return position % (self.select_block if all_are_read else self.select_every) == 0

    @property
    def further_blocks(self) -> int:
        """Blocks before a query's own and the one before that in which its window may begin."""
        return max(0, blocks_for(self.window - 1, self.select_block) - 1)

    def whole_blocks(self, length: int) -> int:
        """`length` rounded up to a multiple of l'."""
        return blocks_for(length, self.select_block) * self.select_block


class NSAState(State):
    """Keys and values of every token and of every complete compressed block, and the choice in force.

    Attributes:
        keys, values: (B, H_kv, capacity, D); the capacity is a multiple of l'.
        compressed_keys, compressed_values: (B, H_kv, capacity, D).
        selected: (B, H_kv, n), the blocks that the group of the next token reads, unless the token begins a group.
        read_keys, read_values: (B, H_kv, R, D), what the branches read for a single token, side by side: a zero, the
            tokens of some blocks, compressed blocks. None until the first single token.
        layout: how many blocks: selected ones, further ones of the window, and the latest two, which are both; and
            whether there are compressed ones.
        read_masks: `token_masks` for this layout.
    """

    batched = ("keys", "values", "compressed_keys", "compressed_values", "selected", "read_keys", "read_values")

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.config = config
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None
        self.selected: Tensor | None = None
        self.read_keys: Tensor | None = None
        self.read_values: Tensor | None = None
        self.layout = (0, 0, 0, False)
        self.read_masks: tuple[Tensor, ...] = ()

    def can_remove(self, count: int) -> bool:
        if super().can_remove(count):
            return True
        left, every = self.seen - count, self.config.select_every  # keys stay; a choice that is past may be lost
        return self.lengths is None and (left % every == 0 or left // every == self.seen // every)

    def remove(self, count: int) -> None:
        if super().can_remove(count):
            self.selected = self._choice_before(count)
        super().remove(count)
        self.read_keys = self.read_values = None

    def _choice_before(self, count: int) -> Tensor:
        """(B, H_kv, n) the choice on record for the first of the last columns of each row."""
        blocks = iter(reversed(self.record.blocks))
        while count > (block := next(blocks)).columns:
            count -= block.columns
        ends = block.columns if block.lengths is None else block.lengths
        return take(block.tensors[0], (ends - count) if isinstance(ends, int) else (ends - count).clamp(min=0), 1)[
            :, :, 0
        ]

    def note_choices(self, columns: int, lengths: Tensor | None, blocks: Tensor, shift: int | Tensor) -> None:
        """Puts tokens on record with what is chosen for each, out of blocks (B, H_kv, G, n) for groups of tokens.

        The first token is the one at `shift` in the first group, as one number or (B,).
        """
        choices = ()
        if self.record_past:
            choices = (take(blocks.repeat_interleave(self.config.select_every, 2), shift, columns),)
        self.note(columns, lengths, *choices)

    def lies_ready(self, position: int) -> bool:
        """Whether a token at `position` reads what the one before it read, and its own key and value."""
        return self.read_keys is not None and not self.config.reads_others(position)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new tokens (B, H_kv, T, D), not counting them yet; returns the buffers."""
        needed, step = self.seen + k.shape[2], self.config.select_block
        self.keys = store(self.keys, k, self.position, needed, step)
        self.values = store(self.values, v, self.position, needed, step)
        return self.keys, self.values

    def append_compressed(self, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Stores compressed blocks (B, H_kv, N, D) from number `start` on; returns all of them.

        A row's incomplete ones are stored too, where the rows differ: none sees them before they are stored again.
        """
        if self.compressed_keys is None or (isinstance(start, int) and start == 0):
            self.read_keys = None  # it has no place for any
        elif self.read_keys is not None:
            self.read_keys, self.read_values = torch.cat([self.read_keys, k], 2), torch.cat([self.read_values, v], 2)
        needed = self.config.visible(self.seen - 1) + k.shape[2]
        self.compressed_keys = store(self.compressed_keys, k, start, needed)
        self.compressed_values = store(self.compressed_values, v, start, needed)
        return self.compressed_keys[:, :, :needed], self.compressed_values[:, :, :needed]

    def read(
        self, k: Tensor, v: Tensor, compressed: tuple[Tensor, Tensor], position: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a token (B, H_kv, 1, D) at `position`, stored already, reads: keys, values, and masks (3, R)."""
        size = self.config.select_block
        if not self.lies_ready(position):
            self._collect(compressed, position)
        else:
            own = 1 + (sum(self.layout[:3]) - 1) * size + position % size
            self.read_keys = store(self.read_keys, k, own, 0)
            self.read_values = store(self.read_values, v, own, 0)
        whole = self.read_keys.shape[2]
        if not self.read_masks or self.read_masks[0].shape[1] < whole:
            self.read_masks = token_masks(self.layout[:3], size, self.config.window, compressed[0].shape[2], k.device)
        return self.read_keys, self.read_values, self.read_masks[position % size].narrow(1, 0, whole)

    def _collect(self, compressed: tuple[Tensor, Tensor], position: int) -> None:
        """Lays out what tokens read from the one at `position` on."""
        size, current = self.config.select_block, position // self.config.select_block
        chosen = self.selected[:, :, -min(current + 1, self.config.num_selected) :]
        first, stop = (current * size + 1 - self.config.window) // size, max(current - 1, 0)
        further = torch.arange(min(max(first, 0), stop), stop, device=chosen.device)
        blocks = chosen[:, :, :-2], further.expand(*chosen.shape[:2], -1), chosen[:, :, -2:]
        tokens = gather_blocks((self.keys, self.values), torch.cat(blocks, 2), size)
        zero = torch.zeros_like(tokens[0][:, :, :1])
        self.read_keys, self.read_values = (torch.cat([zero, *t], 2) for t in zip(tokens, compressed, strict=True))
        layout = *(part.shape[2] for part in blocks), compressed[0].shape[2] > 0
        if layout != self.layout:
            self.layout, self.read_masks = layout, ()

    # The same where rows differ in position: all in the layout of a long text, and what a row has not is hidden.

    @property
    def rows_lie_ready(self) -> bool:
        """Whether tokens read what those before them read, but where `NSAConfig.reads_others`."""
        return self.read_keys is not None and self.layout == OF_ROWS

    def append_compressed_of(self, rows: Tensor, numbers: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores the compressed blocks (R, H_kv, 1, D), whose numbers are (R,), that some rows complete."""
        needed, before = self.config.visible(self.seen), self.compressed_keys
        self.compressed_keys = writable(with_room(self.compressed_keys, self.keys, needed), k)
        self.compressed_values = writable(with_room(self.compressed_values, self.values, needed), v)
        self.compressed_keys[rows, :, numbers] = k[:, :, 0]
        self.compressed_values[rows, :, numbers] = v[:, :, 0]
        if self.compressed_keys is not before:
            self.read_keys = None  # it has no place for so many
        if self.rows_lie_ready:
            places = numbers + self._compressed_place
            self.read_keys, self.read_values = writable(self.read_keys, k), writable(self.read_values, v)
            self.read_keys[rows, :, places], self.read_values[rows, :, places] = k[:, :, 0], v[:, :, 0]

    @property
    def _compressed_place(self) -> int:
        """Where the compressed blocks begin among what is read."""
        config = self.config
        return 1 + (config.num_selected + config.further_blocks) * config.select_block

    def read_of_rows(
        self, k: Tensor, v: Tensor, positions: Tensor, begun: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a token (B, H_kv, 1, D) at `positions` (B,), stored already, reads: keys, values, and masks (B, 3, R).

        Args:
            begun: (R,) the rows in which it reads other blocks than the one before it; None: there are none.
        """
        config, size = self.config, self.config.select_block
        if not self.rows_lie_ready:
            begun = torch.arange(len(k), device=k.device)
            room = 0 if self.compressed_keys is None else self.compressed_keys.shape[2]
            shape = *k.shape[:2], self._compressed_place + room, k.shape[3]
            self.read_keys, self.read_values = k.new_zeros(shape), v.new_zeros(shape)
            if room:
                self.read_keys[:, :, -room:] = self.compressed_keys
                self.read_values[:, :, -room:] = self.compressed_values
            blocks = config.num_selected - 2, config.further_blocks, 2
            compressed = config.compress_stride, config.compress_block
            self.layout = OF_ROWS
            self.read_masks = row_masks(blocks, size, config.window, room, compressed, k.device)
        if begun is not None:
            self._collect_rows(begun, positions[begun] // size)
        own = self._compressed_place - size + positions % size
        self.read_keys = store(self.read_keys, k, own, 0)
        self.read_values = store(self.read_values, v, own, 0)
        by_place, first = self.read_masks
        hidden = first > positions[:, None]
        hidden[:, 0] = positions >= config.compress_block - 1  # the zero is read where no compressed block is
        masks = by_place[positions % size].masked_fill_(hidden[:, None], -torch.inf)
        return self.read_keys, self.read_values, masks

    def _collect_rows(self, rows: Tensor, current: Tensor) -> None:
        """Lays out what tokens read from now on, in rows (R,) whose tokens stand in blocks `current` (R,)."""
        chosen = self.selected[rows]
        further = current[:, None] - 1 + torch.arange(-self.config.further_blocks, 0, device=rows.device)
        further = further.clamp(min=0)[:, None].expand(-1, chosen.shape[1], -1)
        blocks = torch.cat([chosen[:, :, :-2], further, chosen[:, :, -2:]], 2)
        tokens = gather_blocks((self.keys, self.values), blocks, self.config.select_block, rows)
        self.read_keys, self.read_values = writable(self.read_keys, tokens[0]), writable(self.read_values, tokens[1])
        for whole, part in zip((self.read_keys, self.read_values), tokens, strict=True):
            whole[:, :, 1 : self._compressed_place].index_copy_(0, rows, part)


class Compression(nn.Module):
    """φ: one compressed key and value for each block of l tokens, a network for each key head (Eq. 7).

    A hidden layer reads the block's keys, each with an encoding of its place in the block added. It yields weights
    with which the block's keys and values are averaged, and a correction of the key. Both begin at zero, so φ begins
    as the mean of the block. Values are averaged and no more: so the branch stays a weighting of the values.
    """

    def __init__(self, config: NSAConfig, layer: LayerShape):
        super().__init__()
        heads, width, hidden = layer.num_kv_heads, layer.head_dim, config.mlp_width
        self.stride, self.overlap = config.compress_stride, config.compress_block // config.compress_stride
        inputs = config.compress_block * width
        generator = seeded_generator(config.seed, layer.layer_idx)
        random = torch.randn(heads, inputs, hidden, generator=generator, device=generator.device)
        self.position = nn.Parameter(torch.zeros(heads, config.compress_block, width))
        self.hidden = nn.Parameter(random * inputs**-0.5)
        self.to_weights = nn.Parameter(torch.zeros(heads, hidden, config.compress_block))
        self.to_key = nn.Parameter(torch.zeros(heads, hidden, width))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed keys and values (B, H_kv, N, D) of k and v (B, H_kv, (N − 1)·d + l, D)."""
        if traced():
            return self._at_once(k, v)
        if k.shape[2] == self.overlap * self.stride:  # one block, as in decoding: no sums over its spans
            hidden = F.gelu((k + self.position).flatten(2)[:, :, None] @ self.hidden)
            weights = self.weights(hidden)
            return weights @ k + hidden @ self.to_key, weights @ v
        hidden = self.hidden_layer(k)
        weights = self.weights(hidden)
        return self.average(k, weights) + hidden @ self.to_key, self.average(v, weights)

    def _at_once(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in operations that a graph holds for any length: every block is laid out."""
        size = self.overlap * self.stride
        number = (k.shape[2] - size) // self.stride + 1
        starts = self.stride * torch.arange(number, device=k.device)[:, None]
        k, v = (t[:, :, starts + torch.arange(size, device=k.device)] for t in (k, v))  # (B, H_kv, N, l, D)
        hidden = F.gelu((k + self.position[:, None]).flatten(3) @ self.hidden)
        weights = self.weights(hidden)[..., None, :]
        return (weights @ k).squeeze(3) + hidden @ self.to_key, (weights @ v).squeeze(3)

    def hidden_layer(self, k: Tensor) -> Tensor:
        """Hidden units (B, H_kv, N, hidden) of the blocks of k; overlapping blocks are never laid out."""
        spans = k.unflatten(2, (-1, self.stride)).flatten(-2)
        parts = self.hidden.unflatten(1, (self.overlap, -1)).unbind(1)
        encoding = self.position.flatten(1)[:, None] @ self.hidden
        return F.gelu(self._over_parts([spans @ part for part in parts]) + encoding)

    def weights(self, hidden: Tensor) -> Tensor:
        """(B, H_kv, N, l): the weights of a block's tokens; they sum to 1."""
        return (hidden @ self.to_weights).softmax(-1, dtype=torch.float32).to(hidden.dtype)

    def average(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Weighted means (B, H_kv, N, D) of the blocks of (B, H_kv, (N − 1)·d + l, D).

        Eight spans of d tokens at a time are one product, with a matrix for each part of a block that a span can be:
        its row i has the weights of span i from column i·d on.
        """
        spans = weights.shape[2] + self.overlap - 1
        missing = -spans % GROUP
        if missing:
            tokens = F.pad(tokens, (0, 0, 0, missing * self.stride))
        parts = [
            F.pad(part, (0, GROUP * self.stride, i, self.overlap - 1 - i + missing))
            for i, part in enumerate(weights.split(self.stride, -1))
        ]
        rows = torch.stack(parts, 2).unflatten(3, (-1, GROUP)).flatten(-2)[..., : GROUP * GROUP * self.stride]
        matrices = rows.unflatten(-1, (GROUP, -1)).transpose(2, 3).flatten(3, 4)
        means = matrices @ tokens.unflatten(2, (-1, GROUP * self.stride))
        by_part = means.unflatten(3, (self.overlap, GROUP)).transpose(3, 2).flatten(3, 4)
        return self._over_parts([part[:, :, :spans] for part in by_part.unbind(2)])

    def _over_parts(self, parts: list[Tensor]) -> Tensor:
        """Sums (B, H_kv, N, ·), over a block's spans, of what (B, H_kv, N + l/d − 1, ·) each span adds as that part."""
        number = parts[0].shape[2] - self.overlap + 1
        return sum(part[:, :, i : i + number] for i, part in enumerate(parts))


class NativeSparseAttention(Mechanism):
    """Σ_c g_c · branch_c over the branches compressed, selected and window (arXiv 2502.11089, Eq. 5).

    * compressed: attention over the compressed blocks that are complete; 0 where there is none yet.
    * selected: attention over the tokens of n blocks: three that are always read, and those that weigh most in the
      compressed branch (Eq. 9), summed over the query heads of a key head (Eq. 10).
    * window: attention over the last w tokens.

    The gates are sigmoids of a linear map of the layer's input, one for each branch and head. The choice of blocks has
    no gradient; φ learns through the compressed branch. Dropout falls on the attention weights of every branch.
    """

    branches = BRANCHES
    takes_float32: ClassVar[bool] = False  # its own weights are of the model's dtype
    config: NSAConfig

    def __init__(self, config: NSAConfig, layer: LayerShape):
        super().__init__(config, layer)
        heads, kv_heads, width = layer.num_heads, layer.num_kv_heads, layer.head_dim
        self.compression = Compression(config, layer)
        starts = torch.tensor([[getattr(config, f"{name}_gate")] for name in BRANCHES]).expand(-1, heads)
        self.gate_weight = nn.Parameter(torch.zeros(len(BRANCHES) * heads, layer.hidden_size))
        self.gate_bias = nn.Parameter(starts.logit().flatten())
        if config.separate_kv:
            maps = torch.eye(width).repeat(len(BRANCHES), kv_heads, 1, 1)
            self.key_maps, self.value_maps = nn.Parameter(maps), nn.Parameter(maps.clone())

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: NSAState | None = None,
        lengths: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        mix = self._token if state is not None and state.seen and q.shape[2] == 1 else self._block
        return mix(self._queries(q), k, v, self.gates(x), state, lengths).to(v.dtype)

    def gates(self, x: Tensor) -> Tensor:
        """(B, 3·H, T, 1) in float32 at the least, by branch and head; 0 for a branch that is off."""
        gates = F.linear(x, self.gate_weight, self.gate_bias)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)).sigmoid().transpose(1, 2)[..., None]
        if not self.disabled:
            return gates
        off = [name in self.disabled for name in BRANCHES]
        return gates.masked_fill(
            torch.tensor(off, device=x.device).repeat_interleave(self.layer.num_heads)[:, None, None], 0
        )

    def _queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """The query of each branch; q·(kW) = (qWᵀ)·k, so a map of keys is applied to queries."""
        if not self.config.separate_kv:
            return (q,) * len(BRANCHES)
        maps = self.key_maps.repeat_interleave(q.shape[1] // self.layer.num_kv_heads, dim=1)
        return tuple(q @ part.transpose(-1, -2) for part in maps)

    def _combine(self, compressed: Tensor, selected: Tensor, window: Tensor, gates: Tensor) -> Tensor:
        """Σ_c g_c · output_c; Σ_j a_j (v_j W) = (Σ_j a_j v_j) W, so a map of values is applied to outputs."""
        if self.config.separate_kv:
            maps = self.value_maps.repeat_interleave(self.layer.num_heads // self.layer.num_kv_heads, dim=1)
            compressed, selected, window = compressed @ maps[0], selected @ maps[1], window @ maps[2]
        to_compressed, to_selected, to_window = gates.chunk(len(BRANCHES), dim=1)
        return (to_compressed * compressed).addcmul_(to_selected, selected).addcmul_(to_window, window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and q.is_cuda and torch.is_grad_enabled():
            # With fused kernels, training in bfloat16 diverged on an H200 (PyTorch 2.11).
            return masked_attention(q, k, v, mask, self._dropout)
        return scaled_dot_product_attention(q, k, v, mask, self._dropout, enable_gqa=q.shape[1] != k.shape[1])

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _block(
        self,
        queries: tuple[Tensor, ...],
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        state: NSAState | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """The output (B, H, T, D) of T tokens that continue `state`."""
        config, length = self.config, k.shape[2]
        start = 0 if state is None else state.position
        shift = start % config.select_block  # as many queries are made up, to begin with a whole block
        first = start - shift
        padded = config.whole_blocks(length + (shift if isinstance(shift, int) else config.select_block - 1))
        if state is None:
            keys, values = (take(t, 0, padded).contiguous() for t in (k, v))
        else:
            keys, values = state.append(k, v)
        compressed = self._compress(keys, values, state, start, length)
        *queries, gates = (take(t, -shift, padded) for t in (*queries, gates))
        blocks = self._choose(queries[0], compressed[0], first, keys.shape[2])
        if state is not None:
            blocks = self._resume(blocks, state, _column(start, k.device))
            state.note_choices(length, lengths, blocks, shift)
            state.advance(length, lengths)
            state.selected = take(blocks, (state.position - first) // config.select_every, 1)[:, :, 0]
            state.read_keys = None
        return take(self._segments(queries, gates, blocks, first, keys, values, compressed), shift, length)

    def _segments(
        self, queries: list[Tensor], gates: Tensor, blocks: Tensor, first: int | Tensor, *context: Any
    ) -> Tensor:
        """`_segment` for any number of queries; a few at a time where no gradients are kept, for less memory."""
        length, size, every = gates.shape[2], self.config.whole_blocks(SEGMENT), self.config.select_every
        if traced() or torch.is_grad_enabled() or length <= size:
            return self._segment(queries, gates, blocks, first, *context)
        whole = torch.empty_like(queries[0])
        for begin in range(0, length, size):
            part, groups = slice(begin, begin + size), slice(begin // every, (begin + size) // every)
            own = [q[:, :, part] for q in queries], gates[:, :, part], blocks[:, :, groups], first + begin
            whole[:, :, part] = self._segment(*own, *context)
        return whole

    def _segment(
        self,
        queries: list[Tensor],
        gates: Tensor,
        blocks: Tensor,
        first: int | Tensor,
        keys: Tensor,
        values: Tensor,
        compressed: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The output (B, H, T, D) of whole blocks of queries from position `first` on."""
        config, size, dropout = self.config, self.config.select_block, self._dropout
        outputs = (
            self._compressed(queries[0], compressed, first),
            selected_branch(queries[1], keys, values, blocks, first, size, config.select_every, dropout),
            window_branch(queries[2], keys, values, first, config.window, size, dropout),
        )
        return self._combine(*outputs, gates)

    def _compressed(self, q: Tensor, compressed: tuple[Tensor, Tensor], first: int | Tensor) -> Tensor:
        """The compressed branch (B, H, T, D) of queries from position `first` on."""
        config, outputs = self.config, []
        if traced():
            visible = config.visible(_column(first, q.device) + torch.arange(q.shape[2], device=q.device))
            return compressed_branch(q, *compressed, visible, None, self._attend)
        for number, part in enumerate(q.split(CHUNK, 2)):
            start, bounds = first + number * CHUNK, (0, compressed[0].shape[2])
            if isinstance(start, int):
                bounds = config.visible(start), config.visible(start + part.shape[2] - 1)
            visible = config.visible(_column(start, q.device) + torch.arange(part.shape[2], device=q.device))
            outputs.append(compressed_branch(part, *compressed, visible, bounds, self._attend))
        return torch.cat(outputs, 2)

    def _token(
        self,
        queries: tuple[Tensor, ...],
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        state: NSAState,
        lengths: Tensor | None,
    ) -> Tensor:
        """The output (B, H, 1, D) of one token that continues `state`."""
        start = state.position
        keys, values = state.append(k, v)
        if isinstance(start, int):
            compressed = self._compress(keys, values, state, start, 1)
            self._choose_for_token(queries[0], compressed[0], state, start)
            read = state.read(k, v, compressed, start)
        else:
            numbers = state.numbers()
            self._compress_rows(state, numbers)
            read = state.read_of_rows(k, v, start, self._choose_in_rows(queries[0], state, numbers))
        state.note_choices(1, lengths, state.selected[:, :, None], 0)
        state.advance(1, lengths)
        return self._mix_token(queries, *read, gates)

    def _mix_token(
        self, queries: tuple[Tensor, ...], keys: Tensor, values: Tensor, masks: Tensor, gates: Tensor
    ) -> Tensor:
        """The output (B, H, 1, D) of one token, whose branches read the same keys through masks (3, R) or (B, 3, R).

        The gates weigh the branches' attention weights, so that one product with the values serves all.
        """
        (batch, heads, _, width), kv_heads, separate = queries[0].shape, keys.shape[1], self.config.separate_kv
        q = torch.cat(queries, 2) if separate else queries[0]
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.bmm(q.reshape(batch * kv_heads, -1, width), keys.mT).view(batch, heads, -1, keys.shape[1])
        masks = masks if masks.ndim == 2 else masks[:, None]
        weights = F.dropout(torch.add(masks, scores, alpha=width**-0.5).softmax(-1), self._dropout)
        if not separate:
            by_head = gates.view(batch, len(BRANCHES), heads).mT.contiguous()
            weights = torch.bmm(by_head.view(-1, 1, len(BRANCHES)), weights.flatten(0, 1))
        weights = weights.view(batch * kv_heads, -1, keys.shape[1]).to(values.dtype)
        mixed = torch.bmm(weights, values).view(batch, heads, -1, width)
        return self._combine(*mixed.split(1, 2), gates) if separate else mixed

    def _compress_rows(self, state: NSAState, numbers: list[int]) -> None:
        """Compresses the block that the new token completes, in the rows, at these positions, where it does."""
        config, device = self.config, state.keys.device
        complete = [row for row, at in enumerate(numbers) if config.visible(at) > config.visible(at - 1)]
        if complete:
            rows = torch.tensor(complete, device=device)
            blocks = torch.tensor([config.visible(numbers[row]) - 1 for row in complete], device=device)
            tokens = (
                take_from(t, rows, blocks * config.compress_stride, config.compress_block)
                for t in (state.keys, state.values)
            )
            state.append_compressed_of(rows, blocks, *self.compression(*tokens))

    def _choose_in_rows(self, q: Tensor, state: NSAState, numbers: list[int]) -> Tensor | None:
        """Renews `state.selected` in the rows, at these positions, whose tokens read other blocks now; (R,) these."""
        others = self.config.reads_others if state.rows_lie_ready else self._begins_group
        begun = [row for row, at in enumerate(numbers) if others(at)]
        if not begun:
            return None
        rows = torch.tensor(begun, device=q.device)
        compressed = state.keys[:, :, :0] if state.compressed_keys is None else state.compressed_keys
        visible = compressed[:, :, : self.config.visible(max(numbers[row] for row in begun))]
        chosen = self._choose(q[rows], visible[rows], state.lengths[rows], state.keys.shape[2])[:, :, 0]
        state.selected = state.selected.index_copy(0, rows, chosen)
        return rows

    def _compress(
        self, keys: Tensor, values: Tensor, state: NSAState | None, start: int | Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """All compressed keys and values, those included that `length` tokens from `start` on complete."""
        config = self.config
        before = config.visible(start - 1)
        if traced() and state is None:  # those that are not complete, too, which no token sees
            number = keys.shape[2] // config.compress_stride
            tokens = (number - 1) * config.compress_stride + config.compress_block
            return self.compression(*(take(t, 0, tokens) for t in (keys, values)))
        if isinstance(before, int):
            number = config.visible(start + length - 1) - before
        else:
            number = -(-length // config.compress_stride)
        if number == 0:
            if before == 0:
                return keys[:, :, :0], values[:, :, :0]
            return state.compressed_keys.narrow(2, 0, before), state.compressed_values.narrow(2, 0, before)
        tokens = (number - 1) * config.compress_stride + config.compress_block
        new = self.compression(*(take(t, before * config.compress_stride, tokens) for t in (keys, values)))
        return new if state is None else state.append_compressed(*new, before)

    def _choose(self, q: Tensor, compressed_keys: Tensor, start: int | Tensor, capacity: int) -> Tensor:
        """(B, H_kv, T / select_every, n): the blocks of every group of queries q (B, H, T, D) from `start` on."""
        config, every = self.config, self.config.select_every
        leaders, number = q[:, :, ::every], compressed_keys.shape[2]
        positions = _column(start, q.device) + every * torch.arange(leaders.shape[2], device=q.device)
        chosen = []
        for begin in range(0, 1 if traced() else leaders.shape[2], LEADERS):
            part = slice(None) if traced() else slice(begin, begin + LEADERS)
            if not traced() and isinstance(start, int):  # later keys are visible to none of them
                number = min(compressed_keys.shape[2], config.visible(start + every * (begin + LEADERS - 1)))
            scores = selection_scores(
                leaders[:, :, part],
                compressed_keys[:, :, :number],
                config.visible(positions[:, part]),
                config.compress_block // config.compress_stride,
                config.select_block // config.compress_stride,
                capacity // config.select_block,
            )
            chosen.append(choose_blocks(scores, positions[:, part] // config.select_block, config.num_selected))
        return torch.cat(chosen, dim=2)

    def _choose_for_token(self, q: Tensor, compressed_keys: Tensor, state: NSAState, position: int) -> None:
        """Renews `state.selected` where the token at `position` begins a group and reads other blocks."""
        config = self.config
        if not self._begins_group(position) or state.lies_ready(position):
            return
        if position // config.select_block >= config.num_selected - 1:
            state.selected = self._choose_of_many(q, compressed_keys, position)
        else:
            state.selected = self._choose(q, compressed_keys, position, state.keys.shape[2])[:, :, 0]

    def _begins_group(self, position: int) -> bool:
        return position % self.config.select_every == 0

    def _choose_of_many(self, q: Tensor, compressed_keys: Tensor, position: int) -> Tensor:
        """What `_choose` gives (B, H_kv, n) for one query that has at least n blocks to choose from."""
        config, current = self.config, position // self.config.select_block
        scores = selection_scores(
            q,
            compressed_keys,
            None,
            config.compress_block // config.compress_stride,
            config.select_block // config.compress_stride,
            current + 1,
        )[:, :, 0, 1 : current - 1]
        order = scores.sort(dim=-1, descending=True, stable=True).indices  # the first of equal ones comes first
        best = order[..., : config.num_selected - FORCED].flip(-1).add_(1)
        forced = torch.tensor([0, current - 1, current], device=q.device)
        return torch.cat([best, forced.expand(*best.shape[:2], -1)], -1)

    def _resume(self, blocks: Tensor, state: NSAState, start: Tensor) -> Tensor:
        """Puts the choice in force into the group that a row's new tokens, from `start` (P, 1) on, do not begin."""
        if state.selected is None:
            return blocks
        config = self.config
        group = start % config.select_block // config.select_every
        begun = (torch.arange(blocks.shape[2], device=blocks.device) == group) & (start % config.select_every != 0)
        return torch.where(begun[:, None, :, None], state.selected[:, :, None], blocks)

    def attention_map(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, H, T, T): Σ_c g_c · A_c over the maps of the branches; `forward` equals its product with v.

        The compressed branch spreads the weight of a block over the block's tokens, as φ averages their values. Rows
        sum to the sum of the gates (of the last two before the first block is complete), not to 1. With
        `separate_kv`, each A_c applies to values that pass through the branch's map.
        """
        parts = self.attention_parts(q, k, x)
        return sum(parts["gates"][..., i, None] * parts[name] for i, name in enumerate(BRANCHES))

    def attention_parts(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """What makes up the map.

        Returns:
            "compressed", "selected", "window": weights (B, H, T, T) of each branch before its gate.
            "gates": (B, H, T, 3), in the order of `branches`.
            "selected_blocks": (B, H_kv, T, J) booleans, True for the blocks of l' tokens that a query reads.
        """
        config, phi, length = self.config, self.compression, k.shape[2]
        block, stride, size = config.compress_block, config.compress_stride, config.select_block
        heads, kv_heads = q.shape[1], k.shape[1]
        keys, spread = nsa_compression(k, phi.position, phi.hidden, phi.to_weights, phi.to_key, stride)
        to_compressed, to_selected, to_window = self._queries(q)
        complete = nsa_visible(length, keys.shape[2], block, stride, k.device)
        weights = visible_weights(to_compressed, repeat_heads(keys, heads), complete)
        scores = nsa_selection_scores(weights, kv_heads, block, stride, size)
        chosen = nsa_selected_blocks(scores, size, config.num_selected, config.select_every)
        read = repeat_heads(chosen, heads).repeat_interleave(size, -1)[..., :length].tril()
        k, window = repeat_heads(k, heads), nsa_window(length, config.window, k.device)
        return {
            "compressed": weights @ repeat_heads(spread, heads),
            "selected": visible_weights(to_selected, k, read),
            "window": visible_weights(to_window, k, window),
            "gates": self.gates(x).unflatten(1, (len(BRANCHES), heads)).squeeze(-1).permute(0, 2, 3, 1),
            "selected_blocks": chosen,
        }

    def new_state(self) -> NSAState:
        return NSAState(self.config)

    def keys_read(self, position: int) -> int:
        """Compressed keys, keys of the selected blocks, keys of the window; a key that two branches read counts twice.

        Once n blocks exist, the query's own counts as a whole one.
        """
        selected = min(position + 1, self.config.num_selected * self.config.select_block)
        return self.config.visible(position) + selected + min(position + 1, self.config.window)

    def keys_scored(self, position: int) -> int:
        """The compressed keys that it sees; the first of every `select_every` queries chooses for all of them."""
        return self.config.visible(position)

    def operations(self, length: int) -> int:
        """Counts the keys that are read, φ, the scores behind each choice, and the gates."""
        config, layer = self.config, self.layer
        width, heads, kv_heads = layer.head_dim, layer.num_heads, layer.num_kv_heads
        read = self._keys_read_before(length)
        scored = sum(config.visible(position) for position in range(0, length, config.select_every))
        network = config.mlp_width * (config.compress_block * width + config.compress_block + width)
        phi = config.visible(length - 1) * (network + 2 * config.compress_block * width)
        maps = 2 * len(BRANCHES) * length * heads * width**2 if config.separate_kv else 0
        gates = length * len(BRANCHES) * heads * (layer.hidden_size + width)
        return 2 * (heads * width * (2 * read + scored) + kv_heads * phi + maps + gates)

    def _keys_read_before(self, length: int) -> int:
        """Σ `keys_read` over the positions before `length`, without going through them."""
        config = self.config
        blocks, rest = divmod(max(length + 1 - config.compress_block, 0), config.compress_stride)
        compressed = config.compress_stride * blocks * (blocks + 1) // 2 + rest * (blocks + 1)
        return (
            compressed
            + _sum_up_to(config.num_selected * config.select_block, length)
            + _sum_up_to(config.window, length)
        )

    def summary(self) -> dict[str, list[float]]:
        """The gates of every head where the layer's input is zero, by branch; on a text see `means`."""
        gates = self.gate_bias.detach().float().sigmoid().unflatten(0, (len(BRANCHES), -1))
        return {f"{name}_gate": gate.tolist() for name, gate in zip(BRANCHES, gates, strict=True)}

    def means(self, x: Tensor) -> dict[str, list[float]]:
        """The gates of every head, by branch."""
        gates = self.gates(x).mean((0, 2, 3)).unflatten(0, (len(BRANCHES), -1))
        return {f"{name}_gate": gate.tolist() for name, gate in zip(BRANCHES, gates, strict=True)}


def _sum_up_to(most: int, length: int) -> int:
    """Σ min(p + 1, most) over p < length."""
    full = min(most, length)
    return full * (full + 1) // 2 + (length - full) * most


def _column(index: int | Tensor, device: torch.device) -> Tensor:
    """One number for all rows as (1, 1), (B,) numbers as (B, 1)."""
    return torch.full((1, 1), index, device=device) if isinstance(index, int) else index[:, None]
