"""Attention through a learned linear combination of masks.

With scores s and candidate masks C_c ∈ {0, 1}, a layer computes p ∝ exp(s) · M with M = Σ_c σ(α_c) C_c. That is
softmax(s + log M): the denominators cancel, so only the support of M is ever computed. Every candidate depends on
the distance i − j alone or on the key j alone, hence M_ij = f(i − j) + g(j): a few distances and a few first keys
("sinks"). A key that is both is listed twice, once with weight f and once with weight g, which adds the two.

Two kinds of candidate look at the text as well, and are listed likewise (see `masks_content`):

* top(n): the n keys so far with the highest scores, a learned linear map of the layer's input, one for each head. Heads
  that look for what matters to every query, such as names, need few keys (the heavy hitters of arXiv 2306.14048).
* induction(n): the keys after the n latest earlier occurrences of the query's own token, where induction heads look
  (arXiv 2209.11895).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from math import inf, isfinite
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from .block_attention import block_attention
from .masks_content import Best, Columns, ContentState, best_columns, followers_of_one, induction_columns
from .masks_plan import CONTENT, SYNTAX, Candidate, Layout, Plan
from .mechanism import (
    LARGEST_SEED,
    LayerShape,
    Mechanism,
    MechanismConfig,
    repeat_heads,
    seeded_generator,
    traced,
    writes_in_place,
)
from .reference import causal_mask, combined_mask, effective_mask, masked_softmax_weights, softmax_weights
from .softmax import SoftmaxAttention, SoftmaxConfig
from .state import KeyValueState, State

MOST_CANDIDATES = 1024  # of a layer
MOST_LISTS = 1000  # as many as a model has layers
LARGEST_SCALE = 100.0  # σ of α is 0 or 1 long before


@dataclass(frozen=True, kw_only=True)
class MasksConfig(MechanismConfig):
    """Options of the masks method.

    Attributes:
        candidates: the masks that are combined, each written last(i), window(w), first(k), dilated(w, s), causal,
            top(n) or induction(n).
        first_layers: the masks of the first layers, where these need others: `first_layers[i]` are those of layer i.
        per_head: one set of weights for each head, else one for the layer.
        init: start of α: zero (every weight σ(α) is ½) or random.
        scale: standard deviation of a random start.
        seed: of a random start.
    """

    method: ClassVar[str] = "masks"
    description: ClassVar[str] = (
        "Every token looks at a few places, such as the last words, the first ones, and those that followed the same "
        "word before; how much each place counts is learned."
    )

    candidates: tuple[str, ...] = (
        *("last(0)", "last(1)", "last(2)", "last(3)"),
        *("window(8)", "window(16)", "window(32)", "window(64)"),
        *("first(1)", "first(4)", "first(8)"),
    )
    first_layers: tuple[tuple[str, ...], ...] = ()
    per_head: bool = True
    init: Literal["zero", "random"] = "zero"
    scale: int | float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        if len(self.first_layers) > MOST_LISTS:
            return [f"first_layers has {len(self.first_layers)} lists; the most is {MOST_LISTS}, one a layer"]
        lists = {"candidates": self.candidates}
        lists |= {f"first_layers[{layer}]": texts for layer, texts in enumerate(self.first_layers)}
        problems = [problem for where, texts in lists.items() for problem in _list_problems(where, texts)]
        if not (isfinite(self.scale) and 0 <= self.scale <= LARGEST_SCALE):
            problems.append(f"scale is {self.scale}; it must be a finite number between 0 and {LARGEST_SCALE}")
        if not 0 <= self.seed <= LARGEST_SEED:
            problems.append(f"seed is {self.seed}; it must lie between 0 and {LARGEST_SEED}")
        return problems

    def of_layer(self, layer_idx: int) -> tuple[Candidate, ...]:
        """The masks that a layer begins with."""
        return tuple(map(Candidate.parse, self.alone(layer_idx).candidates))

    def alone(self, layer_idx: int) -> MasksConfig:
        """As in `MechanismConfig`."""
        own = self.first_layers[layer_idx] if layer_idx < len(self.first_layers) else self.candidates
        return replace(self, candidates=own, first_layers=())

    def of_all_layers(self) -> list[Candidate]:
        """Every mask that some layer begins with."""
        return list(dict.fromkeys(Candidate.parse(text) for text in chain(self.candidates, *self.first_layers)))

    def build(self, layer: LayerShape) -> MasksAttention:
        return MasksAttention(self, layer)


def _list_problems(where: str, texts: tuple[str, ...]) -> list[str]:
    """What is wrong with the masks of a layer, which the option `where` names."""
    if len(texts) > MOST_CANDIDATES:
        return [f"{where} lists {len(texts)} masks; the most is {MOST_CANDIDATES}"]
    problems, names = [], []
    for text in texts:
        try:
            names.append(Candidate.parse(text).name)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if not texts:
        problems.append(f"{where} is empty; name at least one: {SYNTAX}")
    if "causal" in names and any(name.startswith(CONTENT) for name in names):
        problems.append(f"{where} lists causal beside masks that choose keys; causal reads every key, so leave one out")
    twice = sorted({name for name in names if names.count(name) > 1})
    return problems + [f"{where} lists {name!r} twice" for name in twice]


class Slide(NamedTuple):
    """Buffers that a state's keys and values slide along.

    Attributes:
        buffers: two (B, H_kv, > sinks + reach, D).
        start: where in them the state begins.
        keys: the state's view of the first; another tensor there has not slid.
    """

    buffers: list[Tensor]
    start: int
    keys: Tensor


class MasksState(State):
    """The first `sinks` keys and values by position, then the last `reach` of them, the latest at the end.

    Attributes:
        keys: (B, H_kv, sinks + reach, D); what a row has not seen yet is arbitrary and finite.
        values: like keys.
        plan: the plan that these sizes belong to.
        bias: (B, 1 or H, 1, K) log M for a query that has all of its keys, once one came.
    """

    batched = ("keys", "values", "bias")
    summarised = ("keys", "values")

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.bias: Tensor | None = None
        self.slide: Slide | None = None

    def push(self, k: Tensor, v: Tensor) -> None:
        """Shifts in one token (B, H_kv, 1, D), which is a sink in every row or in none."""
        self.note(1, None, k, v)
        if writes_in_place():
            self._slide(k, v)
        else:
            sinks = self.plan.sinks
            self.keys = torch.cat([self.keys[:, :, :sinks], self.keys[:, :, sinks + 1 :], k], 2)
            self.values = torch.cat([self.values[:, :, :sinks], self.values[:, :, sinks + 1 :], v], 2)
        if self.least < self.plan.sinks:  # then all rows have the same length
            self.keys[:, :, self.seen] = k[:, :, 0]
            self.values[:, :, self.seen] = v[:, :, 0]
        self.advance(1, None)

    def _slide(self, k: Tensor, v: Tensor) -> None:
        """Has keys and values be views that go along a longer buffer, so that a token moves the sinks alone."""
        sinks, size = self.plan.sinks, self.plan.sinks + self.plan.reach
        if self.slide is None or self.slide.keys is not self.keys:
            room = self.keys.new_zeros(*self.keys.shape[:2], size // 2 + 1, self.keys.shape[3])
            self.slide = Slide([torch.cat([t, room], 2) for t in (self.keys, self.values)], 0, self.keys)
        buffers, start, _ = self.slide
        if start + size == buffers[0].shape[2]:
            for buffer in buffers:
                buffer[:, :, :size] = buffer[:, :, start:].clone()
            start = 0
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, :, start + 1 : start + 1 + sinks] = buffer[:, :, start : start + sinks].clone()
            buffer[:, :, start + size] = new[:, :, 0]
        self.keys, self.values = (buffer[:, :, start + 1 : start + 1 + size] for buffer in buffers)
        self.slide = Slide(buffers, start + 1, self.keys)

    def nbytes(self) -> int:
        held = super().nbytes()
        if self.slide is not None and self.slide.keys is self.keys:
            pairs = zip(self.slide.buffers, (self.keys, self.values), strict=True)
            held += sum(buffer.nbytes - view.nbytes for buffer, view in pairs)
        return held

    def absorb(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        """Takes in T tokens (B, H_kv, T, D), of which the first `lengths` of each row are real."""
        self.note(k.shape[2], lengths, k, v)
        self._take_in(k, v, lengths)

    def _take_in(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        index = self._survivors(k, lengths)
        self.keys, self.values = (self._keep(*pair, index, lengths) for pair in ((self.keys, k), (self.values, v)))
        self.advance(k.shape[2], lengths)

    def can_remove(self, count: int) -> bool:
        return self.seen <= self.plan.reach or super().can_remove(count)

    def remove(self, count: int) -> None:
        if not super().can_remove(count):  # nothing has left the buffer yet
            super().remove(count)
            self._shift_back(count)
            return
        super().remove(count)
        for block in self.rewind():
            self._take_in(*block.tensors, block.lengths)

    def _shift_back(self, count: int) -> None:
        sinks = self.plan.sinks
        for name in ("keys", "values"):
            first, last = getattr(self, name).tensor_split([sinks], 2)
            setattr(self, name, torch.cat([first, last.roll(count, 2)], 2))

    def _survivors(self, new: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, sinks + reach) what to keep, counted along the buffer and then the new tokens (see `_keep`)."""
        sinks, size, device = self.plan.sinks, self.plan.sinks + self.plan.reach, new.device
        start = self.positions(len(new), device)[:, None]
        count = min(new.shape[2], size) if lengths is None else lengths[:, None]
        first = torch.arange(sinks, device=device)
        first = torch.where(first < start, first, first - start + size)
        last = torch.arange(sinks, size, device=device) + count
        last = last.expand(len(new), -1)
        longest = size + (count if lengths is None else new.shape[2])
        return torch.cat([first, last], 1).clamp(max=longest - 1)

    def _keep(self, old: Tensor | None, new: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
        sinks, reach = self.plan.sinks, self.plan.reach
        if lengths is None and new.shape[2] > sinks + reach:  # what lies between is not kept, so not copied either
            new = torch.cat([new[:, :, :sinks], new[:, :, -reach:]], 2)
        batch, heads, _, width = new.shape
        old = new.new_zeros(batch, heads, sinks + reach, width) if old is None else old
        return torch.cat([old, new], 2).gather(2, index[:, None, :, None].expand(-1, heads, -1, width))


class MasksAttention(Mechanism):
    """softmax(q kᵀ / √D + log M) v with M = Σ_c σ(α_c) C_c, over the support of M; see the module's docstring.

    A query whose support is empty reads its own value. Dropout applies to the attention weights. With `causal` among
    the active candidates the support is everything: that path is quadratic, and is softmax itself where `causal` is
    alone. The scores of `top` learn in `selection_loss` alone: the choice of keys has no gradient.

    Attributes:
        alpha: (C,) or (H, C), the logits of the weights, of the masks of all layers.
        active: like alpha; False for masks that are not this layer's or were pruned. Change it with `prune` or by
            loading only.
    """

    choosing = ("to_scores",)

    def __init__(self, config: MasksConfig, layer: LayerShape):
        super().__init__(config, layer)
        self.candidates = config.of_all_layers()
        self.branches = tuple(candidate.name for candidate in self.candidates)
        shape = (layer.num_heads, len(self.candidates)) if config.per_head else (len(self.candidates),)
        alpha = torch.zeros(shape)
        if config.init == "random":
            alpha = config.scale * torch.randn(shape, generator=seeded_generator(config.seed, layer.layer_idx))
        self.alpha = nn.Parameter(alpha)
        own = config.of_layer(layer.layer_idx)
        active = torch.tensor([candidate in own for candidate in self.candidates])
        self.register_buffer("active", active.expand(shape).clone())
        if any(candidate.kind == "top" for candidate in own):
            start = torch.zeros(layer.num_heads, layer.hidden_size)
            self.to_scores = nn.Parameter(start, requires_grad=False)  # only `selection_loss` would give it a gradient
        self.softmax = SoftmaxAttention(SoftmaxConfig(), layer)
        self._planned: tuple[Tensor, frozenset[str], Plan] | None = None

    def plan(self) -> Plan:
        """What the kernel computes now; made again when the active candidates change.

        A graph is made for the plan that there was before: what is active cannot be read then.
        """
        if traced() and self._planned is not None and self._planned[1] == self.disabled:
            return self._planned[2]
        if self._planned is not None and self._planned[0] is self.active and self._planned[1] == self.disabled:
            return self._planned[2]
        enabled = [name not in self.disabled for name in self.branches]
        active = [[a and b for a, b in zip(on, enabled, strict=True)] for on in self._rows(self.active).tolist()]
        plan = Plan(self.candidates, active).settle()
        self._planned = (self.active, self.disabled, plan)
        return plan

    def settle(self) -> None:
        self._planned = None
        self.plan()

    def disable(self, *names: str) -> None:
        super().disable(*names)
        self.plan()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._planned = None

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        """(C,) or (H, C) as (1 or H, C)."""
        return x if x.ndim == 2 else x[None]

    def prune(self, threshold: float) -> list[str]:
        """Drops every candidate whose weight σ(α) is below a threshold; the kernel then reads less.

        Returns:
            What was dropped: names of candidates, with their head where heads have their own.

        Raises:
            ValueError: if the threshold does not lie between 0 and 1.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; weights lie between 0 and 1, so it must too")
        keep = self.active & (self.alpha.detach().sigmoid() >= threshold)
        dropped = self._rows(self.active & ~keep).nonzero().tolist()
        self.active = keep
        self.settle()
        if not self.config.per_head:
            return [self.branches[c] for _, c in dropped]
        return [f"head {head}: {self.branches[c]}" for head, c in dropped]

    def weights(self) -> Tensor:
        """(1 or H, C) σ(α) in float32, 0 where pruned or disabled and nowhere else."""
        weights = self._weights() * self._rows(self.active)
        if self.disabled:
            weights = weights * torch.tensor([name not in self.disabled for name in self.branches]).to(weights)
        return weights

    def _weights(self) -> Tensor:
        # The least positive number, not 0, keeps the support as planned when σ underflows.
        weights = self.alpha.float().sigmoid().clamp_min(torch.finfo(torch.float32).tiny)
        return self._rows(weights)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        plan = self.plan()
        self._check(state, plan)
        # What a step keeps of the weights for the steps after it has no gradient.
        single = q.shape[2] == 1 and lengths is None and not torch.is_grad_enabled()
        if plan.by_content:
            self._check_tokens(plan, tokens)
            if single and state is not None and state.seen:
                return self._content_step(plan, q, k, v, x, state, tokens)
            return self._by_content(plan, q, k, v, x, state, lengths, tokens)
        if plan.softmax:
            return self.softmax(q, k, v, x, state, lengths)
        if plan.dense:
            return self._dense(q, k, v, state, lengths)
        if state is None or state.seen == 0:
            if state is not None:
                state.absorb(k, v, lengths)
            return self._from_start(plan, q, k, v)
        complete = state.least >= plan.depth
        alike = plan.reads_at_once and (state.lengths is None or state.least >= plan.sinks)
        if single and (complete or alike):
            return self._step(plan, q, k, v, state)
        return self._continue(plan, q, k, v, state, lengths)

    @staticmethod
    def _check(state: State | None, plan: Plan) -> None:
        if state is None:
            return
        made_for = getattr(state, "plan", None)
        if not (plan.dense if made_for is None else made_for is plan or made_for == plan):
            raise ValueError("the active candidates changed since this state was made; start with a new one")

    @staticmethod
    def _check_tokens(plan: Plan, tokens: Tensor | None) -> None:
        if plan.induction and tokens is None:
            raise ValueError("induction(n) looks for tokens: give their input_ids, too, where you give inputs_embeds")

    def _from_start(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows that start here: only the first blocks can miss keys."""
        layout = plan.layout(q.device, *plan.cut(q.shape[2], q.device))
        hidden = layout.hidden_at_start
        if not traced():  # else the blocks that there are find theirs
            hidden = hidden[:, :, : layout.blocks(q.shape[2])]
        bias = layout.log_mask(self._weights()) + hidden
        return self._blocks(layout, q, k, v, bias, 0)

    def _continue(
        self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, state: MasksState, lengths: Tensor | None
    ) -> Tensor:
        """Tokens after what the state has seen."""
        layout = plan.layout(q.device, *plan.cut(q.shape[2], q.device))
        hidden = layout.hidden_later
        if state.least < plan.depth:
            hidden = layout.hidden(state.positions(len(q), q.device), layout.blocks(q.shape[2]))
        tails = state.keys[:, :, plan.sinks :], state.values[:, :, plan.sinks :]
        state.absorb(k, v, lengths)
        k = torch.cat([state.keys[:, :, : plan.sinks], tails[0], k], 2)
        v = torch.cat([state.values[:, :, : plan.sinks], tails[1], v], 2)
        return self._blocks(layout, q, k, v, layout.log_mask(self._weights()) + hidden, plan.sinks + plan.reach)

    def _blocks(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, before: int) -> Tensor:
        """Queries (B, H, T, D) whose first has its own key at place `before` of k and v.

        `bias` (1 or B, 1 or H, N, b, S + U) is added to the scores; N as in `block_attention`.
        """
        batch, heads, length, _ = q.shape
        k, v, bias = repeat_heads(k, heads), repeat_heads(v, heads), layout.in_lists(bias)
        bias = bias[0] if bias.shape[:2] == (1, 1) else bias.expand(batch, heads, -1, -1, -1).flatten(0, 1)
        index, joined, skip = layout.lists(layout.blocks(length), before, k.shape[2])
        options = {"dropout": self._dropout, "joined": joined, "skip": skip}
        mixed = block_attention(layout.by_block(q), k, v, bias, index[None], **options)
        return layout.by_position(mixed, length)

    def _step(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, state: MasksState) -> Tensor:
        """One token in every row, which is a sink in every row or in none."""
        layout = plan.layout(q.device, 1)
        if state.bias is None:
            bias = layout.log_mask(self._weights().detach()) + layout.hidden_later
            state.bias = bias[:, :, 0].to(q.dtype).expand(len(q), -1, -1, -1)
        bias = state.bias
        if state.least < plan.depth:
            position = state.position if state.lengths is None else state.lengths[:, None, None, None]
            bias = bias.masked_fill(layout.distance > position, -inf)
        state.push(k, v)
        k, v = state.keys, state.values
        if layout.decode_index is not None:
            k, v = k.index_select(2, layout.decode_index), v.index_select(2, layout.decode_index)
        grouped = k.shape[1] != q.shape[1]
        return scaled_dot_product_attention(q, k, v, bias, dropout_p=self._dropout, enable_gqa=grouped)

    def _by_content(
        self,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: ContentState | None,
        lengths: Tensor | None,
        tokens: Tensor | None,
    ) -> Tensor:
        """Queries (B, H, T, D) whose keys depend on the text."""
        length = q.shape[2]
        start = torch.zeros(1, dtype=torch.long, device=q.device)
        if state is not None:
            start = state.positions(len(q), q.device)
        layout = plan.layout(q.device, *plan.cut(length, q.device))
        chosen = self._chosen(plan, layout.block, x, start, state, lengths, tokens)
        if state is not None:
            state.append(k, v, lengths)
            k, v = state.read_all()
        blocks = layout.blocks(length)
        places = [
            layout.index(blocks, start[:, None], k.shape[2])[:, None],
            *(one.positions for one in chosen.values()),
        ]
        index = torch.cat([part.expand(*q.shape[:2], -1, -1) for part in places], -1).clamp_(max=k.shape[2] - 1)
        bias = self._content_bias(plan, layout, start, blocks, chosen, q.shape[:2])
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        return block_attention(q, k, v, bias.flatten(0, 1), index.flatten(0, 1), dropout=self._dropout)

    def _chosen(
        self,
        plan: Plan,
        block: int,
        x: Tensor,
        start: Tensor,
        state: ContentState | None,
        lengths: Tensor | None,
        tokens: Tensor | None,
    ) -> dict[str, Columns]:
        """The keys that each kind of mask finds in the text; the state learns what it needs to find more."""
        chosen = {}
        if plan.top:
            scores = self._scores(x).detach()
            before = Best.none(scores, plan.top) if state is None or state.best_scores is None else state.best_keys()
            chosen["top"] = best_columns(before, scores, start, block)
            if state is not None:
                state.rank(before, scores, lengths)
        if plan.induction:
            tokens = tokens if state is None else state.append_tokens(tokens)
            chosen["induction"] = induction_columns(tokens, start, x.shape[1], plan.induction, block)
        return chosen

    def _scores(self, x: Tensor) -> Tensor:
        """(B, H, T) the scores of the keys for `top`, in float32, so that a half-precision cache changes no choice.

        In the first layer a token that comes again has the same score again, and which of the two is chosen must not
        depend on in how many pieces a text is read; so there they are added up in float64, where the device has that.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._scores(x)
        wide = torch.float64 if self.layer.layer_idx == 0 and x.device.type != "mps" else torch.float32
        return F.linear(x.to(wide), self.to_scores.to(wide)).float().transpose(1, 2)

    def _content_bias(
        self,
        plan: Plan,
        layout: Layout,
        start: Tensor,
        blocks: int,
        chosen: dict[str, Columns],
        batch_and_heads: torch.Size,
    ) -> Tensor:
        """(B, H, blocks, b, K) log M over the same keys, −∞ where it is 0."""
        weights = self._weights()
        parts = [layout.log_mask(weights) + layout.hidden(start, blocks, or_own=False)]
        parts += [
            self._log_by_rank(plan, kind, columns.rank, weights * layout.active) for kind, columns in chosen.items()
        ]
        return self._joined(plan, layout, parts, batch_and_heads)

    @staticmethod
    def _joined(plan: Plan, layout: Layout, parts: list[Tensor], batch_and_heads: torch.Size) -> Tensor:
        """The log M of all columns (B, H, ..., K) from parts; a query that reads none of them reads its own key."""
        bias = torch.cat([part.expand(*batch_and_heads, *part.shape[2:]) for part in parts], -1)
        if plan.reads_at_once:
            return bias
        own = F.pad(layout.own, (0, bias.shape[-1] - layout.own.shape[-1]))
        return bias.masked_fill(own & (bias == -inf).all(-1, keepdim=True), 0.0)

    @staticmethod
    def _log_by_rank(plan: Plan, kind: str, rank: Tensor, weights: Tensor) -> Tensor:
        """log M for keys of these ranks (B, 1 or H, ...) under the masks of one kind, weights (1 or H, C)."""
        used = plan.ranks[kind]
        bias = torch.full((), -inf, device=rank.device)
        for number in sorted({*used.values()}, reverse=True):
            total = weights[:, [index for index, each in used.items() if each >= number]].sum(1)
            log = torch.where(total > 0, total, 1.0).log().masked_fill(total == 0, -inf)
            bias = torch.where(rank < number, log.view(-1, 1, 1, 1), bias)
        return bias

    def _content_step(
        self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: ContentState, tokens: Tensor | None
    ) -> Tensor:
        """One token in every row: what it reads is gathered by one index, and SDPA runs on that."""
        layout, (batch, heads) = plan.layout(q.device, 1), q.shape[:2]
        position = state.position if state.lengths is None else state.position[:, None, None]
        if state.logs is None:
            state.logs = self._step_logs(plan, layout)
        index, logs = [layout.read_at(position)], dict(state.logs)
        if state.least < plan.depth:
            behind = position if isinstance(position, int) else position[..., None]
            logs["fixed"] = logs["fixed"].masked_fill(layout.distance > behind, -inf)
        if plan.top:
            best = state.rank(state.best_keys(), self._scores(x).detach(), None)
            index.append(best.positions)
            if state.least < plan.top:
                logs["top"] = logs["top"].masked_fill(best.scores[:, :, None] == -inf, -inf)
        if plan.induction:
            found = followers_of_one(state.append_tokens(tokens), tokens, position, plan.induction)
            index.append(found)
            logs["induction"] = logs["induction"].masked_fill(found[:, :, None] == 0, -inf)
        state.append(k, v, None)
        keys, values = state.read(torch.cat([part.expand(batch, heads, -1) for part in index], -1))
        bias = self._joined(plan, layout, list(logs.values()), q.shape[:2])
        return scaled_dot_product_attention(q, keys, values, bias.to(q.dtype), dropout_p=self._dropout)

    def _step_logs(self, plan: Plan, layout: Layout) -> dict[str, Tensor]:
        """(1, 1 or H, 1, ·) log M for one query that misses no key: its fixed places, then chosen keys by rank."""
        weights = self._weights().detach() * layout.active
        later = torch.full_like(layout.relative[:1], layout.depth)
        logs = {"fixed": (layout.log_mask(weights) + layout.hidden(later, 1, or_own=False))[:, :, 0]}
        for kind, number in (("top", plan.top), ("induction", plan.induction)):
            rank = torch.arange(number, device=weights.device).view(1, 1, 1, 1, -1)
            logs |= {kind: self._log_by_rank(plan, kind, rank, weights)[:, :, 0]} if number else {}
        return logs

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, lengths: Tensor | None) -> Tensor:
        """Softmax over all keys with log M added to the scores."""
        start = torch.zeros(1, dtype=torch.long, device=q.device)
        if state is not None:
            start = state.positions(len(q), q.device)
            k, v = state.append(k, v, lengths)
        positions = start[:, None] + torch.arange(q.shape[2], device=q.device)
        bias = self._dense_bias(positions, k.shape[2]).to(q.dtype)
        grouped = k.shape[1] != q.shape[1]
        return scaled_dot_product_attention(q, k, v, bias, dropout_p=self._dropout, enable_gqa=grouped)

    def _dense_bias(self, positions: Tensor, length: int) -> Tensor:
        """(B, 1 or H, T, S) log M for queries at `positions` (B, T) and keys 0 to S − 1."""
        weights, key = self.weights(), torch.arange(length, device=positions.device)
        near = torch.stack([c.at_distance(key) for c in self.candidates]).float()
        first = torch.stack([c.at_key(key) for c in self.candidates]).float()
        distance = positions[..., None] - key
        with torch.autocast(weights.device.type, enabled=False):
            mask = (weights @ near)[:, distance.clamp(0, length - 1)] + (weights @ first)[:, None, None]
        read = (mask > 0) & (distance >= 0)
        bias = torch.where(read, mask, 1).log().masked_fill(~read, -inf)
        own = (distance == 0) & ~read.any(-1, keepdim=True)
        return bias.masked_fill(own, 0.0).transpose(0, 1)

    def selection_loss(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor | None:
        """Cross-entropy between softmax attention and the softmax of the scores, over the keys that are left to `top`.

        Those are the keys that no other mask of the head holds for; a query counts by its weight on them. It is the
        warm-up of the indexer of DeepSeek-V3.2 (arXiv 2512.02556, Eq. 3), with scores that all queries share.
        """
        plan, length = self.plan(), q.shape[2]
        if not plan.top:
            return None
        with torch.no_grad():
            left = self._left_to_top(length, tokens)
            weights = softmax_weights(q, repeat_heads(k, q.shape[1])) * left
        scores = self._scores(x)
        logits = scores[:, :, None].expand(-1, -1, length, -1).masked_fill(~left, torch.finfo(scores.dtype).min)
        return (weights.sum(-1) * logits.logsumexp(-1) - (weights * scores[:, :, None]).sum(-1)).mean()

    def _left_to_top(self, length: int, tokens: Tensor | None) -> Tensor:
        """(1 or B, 1 or H, T, T) booleans: the keys of the past that no mask but `top` holds for."""
        self._check_tokens(self.plan(), tokens)
        others = [candidate for candidate in self.plan().used if candidate.kind != "top"]
        mask = combined_mask(*self._combination(others), length, tokens=tokens)
        return causal_mask(length, mask.device) & (mask == 0)

    def _combination(self, candidates: list[Candidate]) -> tuple[list[tuple[str, tuple[int, ...]]], Tensor]:
        """Some of the masks, as the definitions name them, and their weights (1 or H, ·)."""
        index = [self.candidates.index(candidate) for candidate in candidates]
        return [(candidate.kind, candidate.numbers) for candidate in candidates], self.weights()[:, index]

    def choosing_parameters(self) -> list[nn.Parameter]:
        return [self.to_scores] if self.plan().top else []

    def attention_map(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        mask = self.attention_parts(q, k, x, tokens)["mask"]
        return masked_softmax_weights(q, repeat_heads(k, q.shape[1]), mask)

    def attention_parts(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """`mask`: M (1 or B, 1 or H, T, T), 1 on the diagonal of rows whose support is empty."""
        plan = self.plan()
        self._check_tokens(plan, tokens)
        scores = self._scores(x) if plan.top else None
        return {"mask": effective_mask(*self._combination(plan.used), q.shape[2], scores, tokens)}

    def grows(self) -> bool:
        plan = self.plan()
        return plan.by_content or plan.dense

    def steady(self, state: State) -> dict[str, Tensor] | None:
        plan = self.plan()
        self._check(state, plan)
        if not isinstance(state, MasksState) or state.bias is None or state.record_past or state.least < plan.depth:
            return None
        return {"keys": state.keys.contiguous(), "values": state.values.contiguous(), "bias": state.bias}

    def new_state(self) -> KeyValueState | MasksState | ContentState:
        plan = self.plan()
        if plan.by_content:
            return ContentState(plan)
        return KeyValueState() if plan.dense else MasksState(plan)

    def keys_read(self, position: int) -> int:
        """The size of the support at `position`, that of all heads together; of chosen keys, the most of one head."""
        plan = self.plan()
        if plan.dense:
            return position + 1
        keys = {position - distance for distance in plan.distances if distance <= position}
        fixed = len(keys.union(range(min(plan.sinks, position + 1))))
        return max(1, min(position + 1, fixed + plan.top + plan.induction))

    def keys_scored(self, position: int) -> int:
        """With `induction` every token so far; with `top` alone the best n, to which each token adds one score."""
        plan = self.plan()
        return position + 1 if plan.induction else min(position + 1, plan.top + 1) * bool(plan.top)

    def operations(self, length: int) -> int:
        """Counts the whole products of a block's queries and keys on a CPU, with what the masks then hide."""
        plan = self.plan()
        if plan.softmax:
            return self.softmax.operations(length)
        width = length if plan.dense else plan.columns(*plan.cut(length, torch.device("cpu")))
        return 2 * 2 * self.layer.num_heads * self.layer.head_dim * length * width

    def penalty(self) -> Tensor:
        """Σ_c σ(α_c) over the active candidates, mean over heads."""
        weights = self.alpha.float().sigmoid()
        return self._rows(weights * self.active).sum(-1).mean()

    def summary(self) -> dict[str, list[float]]:
        """The weight of every candidate by name, one for each head where heads have their own; 0 if pruned."""
        weights = self._rows(self.alpha.detach().float().sigmoid() * self.active)
        return dict(zip(self.branches, weights.T.tolist(), strict=True))
