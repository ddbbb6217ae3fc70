"""Performer: linear attention through feature maps, random or learned, with an optional exact window."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .mechanism import (
    FARTHEST,
    LARGEST_SEED,
    LayerShape,
    Mechanism,
    MechanismConfig,
    repeat_heads,
    traced,
    writes_in_place,
)
from .performer_features import FEATURE_MAPS, FeatureMap, FeatureState, RandomMap
from .performer_kernel import ScaledOne, Steps, linear_chunks, rescaled, window_attention
from .reference import softmax_weights
from .state import Block, State

CPU_SEGMENT, SEGMENT = 512, 8192  # tokens worked on at a time: on a CPU what is temporary must fit its cache
NOTHING = -1e30  # log of a feature that no key has; finite, so that differences of two are not NaN

MOST_FEATURES = 8192  # of a layer, for each of its heads
MOST_LAYERS = 1000
LARGEST = {"hidden": 8192, "redraw_every": LARGEST_SEED, "window": FARTHEST, "seed": LARGEST_SEED}


@dataclass(frozen=True, kw_only=True)
class PerformerConfig(MechanismConfig):
    """Options of linear attention, Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j).

    Attributes:
        feature_map: φ. `favor`: positive random features, an unbiased estimate of exp(q·k/√D) (arXiv 2009.14794);
            `relu`: rectified random projections (same paper); `learned`: exp of a learned map, one per layer and head,
            made to be fitted to softmax attention (after arXiv 2402.04347).
        num_features: m, the number of features; even for `favor` with `hyperbolic`. A list gives each layer its own,
            the last number also to the layers after it: layers that look far for single keys need more, and behind
            a window 0 leaves a layer to the window alone.
        hidden: width of a hidden layer inside the learned map; 0 leaves it linear.
        fade: learned features fade with distance, each at its own learned rate (as in arXiv 2312.06635).
        orthogonal: draw the random projections orthogonal in blocks of D, which lowers the variance.
        hyperbolic: `favor` with exp(±ωᵀx) for half as many ω, which lowers the variance.
        redraw_every: draw new random projections every so many training steps; 0: never.
        window: w, the number of last keys (the query's own among them) that get exact softmax attention; the linear
            part carries the older ones, under one normaliser (arXiv 2410.10254): an older key counts φ(q)·φ(k)
            beside the window's exp(s), times exp of a learned number and, except for `favor`, of the window's mean
            score. 0: the linear part carries all.
        chunk_size: tokens that the kernel mixes by one matrix product; changes speed, not results.
        seed: of the random projections and the learned map's start.
    """

    method: ClassVar[str] = "performer"
    description: ClassVar[str] = (
        "The past is folded into a summary of fixed size that each token adds to, so a token costs the same at any "
        "length; the nearest tokens can stay exact."
    )

    feature_map: Literal["favor", "relu", "learned"] = "learned"
    num_features: int | tuple[int, ...] = 64
    hidden: int = 0
    fade: bool = True
    orthogonal: bool = True
    hyperbolic: bool = True
    redraw_every: int = 0
    window: int = 0
    chunk_size: int = 64
    seed: int = 0

    def problems(self) -> list[str]:
        problems = []
        least, but = (0, "") if self.window else (1, "; 0 needs a window")
        if min(self._numbers, default=-1) < least:
            problems.append(f"num_features is {self.num_features}; it must be at least {least}{but}")
        if self.feature_map == "favor" and self.hyperbolic and any(number % 2 for number in self._numbers):
            problems.append(f"num_features is {self.num_features}; with hyperbolic features it must be even")
        if max(self._numbers, default=0) > MOST_FEATURES or len(self._numbers) > MOST_LAYERS:
            problems.append(f"num_features is too large; the most is {MOST_FEATURES}, and {MOST_LAYERS} numbers")
        for name, most in LARGEST.items():
            if not 0 <= (value := getattr(self, name)) <= most:
                problems.append(f"{name} is {value}; it must lie between 0 and {most}")
        if not 1 <= self.chunk_size <= 128:
            problems.append(f"chunk_size is {self.chunk_size}; it must lie between 1 and 128")
        if self.redraw_every and self.feature_map == "learned":
            problems.append("redraw_every is set, but a learned feature map has nothing random to redraw")
        return problems

    @property
    def _numbers(self) -> tuple[int, ...]:
        return self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)

    def alone(self, layer_idx: int) -> PerformerConfig:
        """As in `MechanismConfig`."""
        return dataclasses.replace(self, num_features=self._numbers[min(layer_idx, len(self._numbers) - 1)])

    def build(self, layer: LayerShape) -> PerformerAttention:
        return PerformerAttention(self.alone(layer.layer_idx), layer)


class Ring(NamedTuple):
    """Views of a state's ring, made once for many tokens.

    Attributes:
        source: the `ring_keys` that they are views of.
        key: (B, H, 1, D) by place.
        row, value: (B, H, 1, D + 1) and (B, H, 1, D) by place.
        keys, rows: (B·H, D, w) and (B·H, w, D + 1).
    """

    source: Tensor
    key: tuple[Tensor, ...]
    row: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    keys: Tensor
    rows: Tensor


class PerformerState(FeatureState):
    """The past as sums over its keys, and the last w keys and values where there is a window; all float32.

    Attributes:
        sums: Σ [v_j, 1] φ(k_j)ᵀ (B, H, D + 1, m) over the keys that have left the window; the last row adds up to the
            normaliser.
        one: (B, H, 1, 1), what a token's value is extended by; kept from the first single token on.
        recent_keys, recent_values: (B, H_kv, w, D), the newest last; rows with fewer tokens have zeros in front.
        ring_keys, ring_rows: (B, H, w, D) and (B, H, w, D + 1), the same for single tokens, of rows of one length
            or that all fill the window: column p in place p mod w, behind its value a one. Either these or the former.
        views: of these two.
        behind: whether tokens were taken back and the sums do not know it yet.
    """

    batched = ("sums", "one", "peaks", "recent_keys", "recent_values", "ring_keys", "ring_rows")
    summarised = ("sums", "peaks", "settled", "recent_keys", "recent_values", "ring_keys", "ring_rows")

    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.sums: Tensor | None = None
        self.one: Tensor | None = None
        self.recent_keys: Tensor | None = None
        self.recent_values: Tensor | None = None
        self.ring_keys: Tensor | None = None
        self.ring_rows: Tensor | None = None
        self.views: Ring | None = None
        self.behind = False

    def reset(self) -> None:
        super().reset()
        self.views, self.behind = None, False

    def resume(self, steady: dict[str, Tensor]) -> None:
        super().resume(steady)
        self.settled = "peaks" not in steady

    def remove(self, count: int) -> None:
        super().remove(count)
        self.behind = True

    def rewind(self) -> list[Block]:
        self.behind, self.views = False, None
        return super().rewind()

    def missing(self) -> int | Tensor:
        """How many slots of the window are still empty; (B,) where the rows differ."""
        if self.lengths is None:
            return max(0, self.window - self.seen)
        return (self.window - self.lengths).clamp_min(0)

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window's keys and values followed by the new ones, (B, H_kv, w + T, D)."""
        self.close_ring(k.shape[1])
        if self.recent_keys is None:
            return F.pad(k, (0, 0, self.window, 0)), F.pad(v, (0, 0, self.window, 0))
        return torch.cat([self.recent_keys, k], 2), torch.cat([self.recent_values, v], 2)

    def ring(self, heads: int) -> Ring:
        """The window as a ring, in which a new token overwrites the oldest and nothing moves."""
        if self.ring_keys is None:
            self._open_ring(heads)
        if self.views is None or self.views.source is not self.ring_keys:
            keys, rows = self.ring_keys, self.ring_rows
            by_place = keys.split(1, 2), rows.split(1, 2), rows[..., :-1].split(1, 2)
            self.views = Ring(keys, *by_place, keys.flatten(0, 1).mT, rows.flatten(0, 1))
        return self.views

    def _open_ring(self, heads: int) -> None:
        recent = (self.recent_keys, self.recent_values)
        keys, values = (repeat_heads(t.roll(self.seen % self.window, 2), heads) for t in recent)
        self.ring_keys, self.ring_rows = keys, F.pad(values, (0, 1), value=1.0)
        self.recent_keys = self.recent_values = None

    def close_ring(self, kv_heads: int) -> None:
        """Lays the window out in order again."""
        if self.ring_keys is None:
            return
        step = self.ring_keys.shape[1] // kv_heads
        ring = self.ring_keys[:, ::step], self.ring_rows[:, ::step, :, :-1]
        self.recent_keys, self.recent_values = (t.roll(-(self.seen % self.window), 2) for t in ring)
        self.ring_keys = self.ring_rows = self.views = None

    def keep_recent(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> None:
        """Keeps the last w real tokens of each row of what `join` returned, of whose new tokens `lengths` are real."""
        if lengths is None:
            start = keys.shape[2] - self.window
            self.recent_keys, self.recent_values = keys[:, :, start:].clone(), values[:, :, start:].clone()
            return
        index = (lengths[:, None] + torch.arange(self.window, device=keys.device))[:, None, :, None]
        self.recent_keys = keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3]))
        self.recent_values = values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))


class PerformerAttention(Mechanism):
    """Linear attention, with exact softmax over the last keys where the config has a window.

    Its `config` is the layer's own: `num_features` is one number, and where that is 0, `features` is None.

    Works on segments of tokens, each after the state that the segments before left, so a prefill is the same code as
    a block of tokens in decoding. In training, dropout falls on the window's weights; the linear part has no weights
    to drop.

    `disable("window")` lets the linear part carry every key, to see what it does on its own.
    """

    def __init__(self, config: PerformerConfig, layer: LayerShape):
        super().__init__(config, layer)
        self.branches = ("linear", "window") if config.window else ("linear",)
        self.features: FeatureMap | None = None
        if not config.num_features:
            return
        self.features = FEATURE_MAPS[config.feature_map](config, layer)
        if config.window:  # log of the linear part's weight beside the window's
            start = 0.0 if self.features.absolute else -math.log(config.num_features)
            self.mix = nn.Parameter(torch.full((layer.num_heads,), start))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: PerformerState | None = None,
        lengths: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        state = self.new_state() if state is None else state
        if not torch.is_autocast_enabled(q.device.type):
            return self._mix(q, k, v, state, lengths, dropout).to(v.dtype)
        with torch.autocast(q.device.type, enabled=False):  # sums over keys need float32
            return self._mix(q, k, v, state, lengths, dropout).to(v.dtype)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, lengths: Tensor | None, dropout: float
    ) -> Tensor:
        q, k, v = q.float(), k.float(), v.float()
        if state.behind:
            for block in state.rewind():
                anything = repeat_heads(block.tensors[0], q.shape[1])  # queries leave no trace in a state
                self._take_in(anything, *block.tensors, state, block.lengths, 0.0)
        state.note(k.shape[2], lengths, k, v)
        return self._take_in(q, k, v, state, lengths, dropout)

    def _take_in(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, lengths: Tensor | None, dropout: float
    ) -> Tensor:
        alike = state.lengths is None or state.least >= state.window
        single = q.shape[2] == 1 and state.seen and lengths is None and alike
        if single and not self.disabled and not torch.is_grad_enabled():
            output = self._step(q, k, v, state)
            state.advance(1, None)
            return output
        if traced():
            output = self._segment(q, k, v, state, lengths, dropout)
            state.advance(q.shape[2], lengths)
            return output
        segment = CPU_SEGMENT if q.device.type == "cpu" else SEGMENT
        whole = v.new_empty(*q.shape[:3], v.shape[3]) if writes_in_place() and q.shape[2] > segment else None
        outputs, start = [], 0
        for part in zip(*(t.split(segment, 2) for t in (q, k, v)), strict=True):
            size = part[0].shape[2]
            real = None if lengths is None else (lengths - start).clamp(0, size)
            target = None if whole is None else whole[:, :, start : start + size]
            outputs.append(self._segment(*part, state, real, dropout, target))
            state.advance(size, real)
            start += size
        if whole is not None:
            return whole
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def _segment(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: PerformerState,
        lengths: Tensor | None,
        dropout: float,
        target: Tensor | None = None,
    ) -> Tensor:
        """Output (B, H, T, D), in `target` if there is one, for tokens that follow those that the state takes up."""
        heads, length = q.shape[1:3]
        size = self.config.chunk_size if traced() else min(self.config.chunk_size, length)
        if not state.window:
            return self._linear(q, k, v, state, Steps(length, size, 0, lengths), target)[0]
        missing = state.missing()
        keys, values = state.join(k, v)
        state.keep_recent(keys, values, lengths)
        keys, values = repeat_heads(keys, heads), repeat_heads(values, heads)
        block = min(self.config.chunk_size, max(16, state.window))
        near, near_log, mean = window_attention(q, keys, values, state.window, missing, block, dropout)
        if self._linear_is_off or (not traced() and isinstance(missing, int) and missing >= length):
            return near if target is None else target.copy_(near)
        steps = Steps(length, size, missing, lengths)
        far, far_log = self._linear(q, keys[:, :, :length], values[:, :, :length], state, steps)
        far_log = far_log + self.mix.float()[:, None]
        if not self.features.absolute:
            far_log = far_log + mean
        share = torch.sigmoid(far_log - near_log)[..., None]
        return torch.lerp(near, far, share) if target is None else torch.lerp(near, far, share, out=target)

    def _linear(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, steps: Steps, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The linear part: query t reads the state's sums and the keys up to t, which the state takes up.

        Args:
            q: (B, H, T, D).
            k, v: (B, H_kv, T, D).
            steps: which are real.
            target: where the output goes; None: into a new tensor.

        Returns:
            (B, H, T, D), zero where there was nothing to read, and, beside a window, the logs of the normalisers
            (B, H, T).
        """
        heads = q.shape[1]
        v = repeat_heads(v, heads)
        if self._linear_is_off:
            return torch.zeros_like(v) if target is None else target.zero_(), None
        if state.sums is None:
            self._start(state, v)
        q, k, v = (steps.padded(t) for t in (q, repeat_heads(k, heads), v))
        scaled = self.features.scale(q, k, steps, state)
        sums = rescaled(state.sums, scaled.entry)
        out, sums = linear_chunks(scaled, steps.chunked(F.pad(v, (0, 1), value=1.0)), sums)
        state.sums = rescaled(sums, scaled.exit)
        mixed, total = out[..., :-1], out[..., -1:]
        bounded = total.clamp_min(torch.finfo(total.dtype).tiny)
        if target is not None and steps.length % steps.size == 0:
            torch.div(mixed, bounded, out=steps.chunked(target))
            mixed = target
        else:
            mixed = steps.joined(mixed / bounded)
            mixed = mixed if target is None else target.copy_(mixed)
        if not state.window:
            return mixed, None
        logs = (scaled.top + bounded.log()).masked_fill(total == 0, -torch.inf)
        return mixed, steps.joined(logs.squeeze(-1))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState) -> Tensor:
        """What `_segment` gives for a single token of rows alike, in few operations and without gradients."""
        if state.window and traced():
            return self._window_step_in_order(q, k, v, state)
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        if state.window:
            return self._window_step(q, k, v, state)
        if state.one is None:
            state.one = torch.ones_like(v[..., :1])
        scaled = self._take_up(q, k, torch.cat([v, state.one], 3), state)
        out = torch.bmm(scaled.q_log.softmax(-1).flatten(0, 1), state.sums.flatten(0, 1).mT)
        return self._normalised(out, scaled, state)

    def _window_step(self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState) -> Tensor:
        """`_step` behind a window: one softmax over the scores of its keys and the logs of the query's features."""
        ring, window, place = state.ring(q.shape[1]), state.window, state.seen % state.window
        linear = state.seen >= window and not self._linear_is_off
        if linear:
            scaled = self._take_up(q, ring.key[place], ring.row[place], state)
        ring.key[place].copy_(k)
        ring.value[place].copy_(v)
        if not linear:
            seen = min(state.seen + 1, window)
            return scaled_dot_product_attention(q, state.ring_keys[:, :, :seen], state.ring_rows[:, :, :seen, :-1])
        return self._read(q, ring.keys, ring.rows, scaled, state)

    def _window_step_in_order(self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState) -> Tensor:
        """`_window_step` for a graph, in which no place of the ring is a number: the oldest key leaves at the front."""
        keys, values = state.recent_keys, state.recent_values
        if not self._linear_is_off:
            row = F.pad(repeat_heads(values[:, :, :1], q.shape[1]), (0, 1), value=1.0)
            scaled = self._take_up(q, repeat_heads(keys[:, :, :1], q.shape[1]), row, state)
        state.recent_keys = keys = torch.cat([keys[:, :, 1:], k], 2)
        state.recent_values = values = torch.cat([values[:, :, 1:], v], 2)
        keys, values = repeat_heads(keys, q.shape[1]), repeat_heads(values, q.shape[1])
        if self._linear_is_off:
            return scaled_dot_product_attention(q, keys, values)
        rows = F.pad(values, (0, 1), value=1.0).flatten(0, 1)
        return self._read(q, keys.flatten(0, 1).mT, rows, scaled, state)

    def _read(self, q: Tensor, keys: Tensor, rows: Tensor, scaled: ScaledOne, state: PerformerState) -> Tensor:
        """What a query (B, H, 1, D) reads of the window, keys (B·H, D, w) and rows (B·H, w, D + 1), and of the sums."""
        near = torch.bmm(q.flatten(0, 1) * q.shape[3] ** -0.5, keys)
        shift = self.mix.float().view(-1, 1, 1)
        if not self.features.absolute:
            shift = torch.add(shift, near.sum(-1).view(*q.shape[:2], 1, 1), alpha=1 / state.window)
        weights = torch.cat([near, (scaled.q_log + shift).flatten(0, 1)], -1).softmax(-1)
        at, beyond = weights.split([state.window, weights.shape[-1] - state.window], -1)
        out = torch.bmm(at, rows).baddbmm_(beyond, state.sums.flatten(0, 1).mT)
        return self._normalised(out, scaled, state)

    def _take_up(self, q: Tensor, k: Tensor, row: Tensor, state: PerformerState) -> ScaledOne:
        """Adds a key (B, H, 1, D), its value and a one (B, H, 1, D + 1) to the sums; the features of q and k."""
        if state.sums is None:
            self._start(state, row[..., :-1])
        scaled = self.features.scale_one(q, k, state)
        if scaled.entry is not None:
            state.sums.mul_(scaled.entry)
        state.sums.addcmul_(row.mT, scaled.k)
        return scaled

    @staticmethod
    def _normalised(out: Tensor, scaled: ScaledOne, state: PerformerState) -> Tensor:
        """(B, H, 1, D) what was read (B·H, 1, D + 1), by its last column; the sums go on to the next token."""
        if scaled.exit is not None:
            state.sums.mul_(scaled.exit)
        out = out.view(*state.sums.shape[:2], 1, -1)
        return out[..., :-1] / out[..., -1:]

    def _start(self, state: PerformerState, v: Tensor) -> None:
        """Sums over no keys, for values (B, H, T, D)."""
        batch, heads, _, width = v.shape
        state.sums = v.new_zeros(batch, heads, width + 1, self.config.num_features)
        state.settled = False
        if self.config.feature_map == "favor":
            state.peaks = v.new_full((batch, heads, 1, self.config.num_features), NOTHING)

    @property
    def _linear_is_off(self) -> bool:
        return self.features is None or "linear" in self.disabled

    def attention_map(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """What `forward` gives when the value of token j is the j-th unit vector (B, H, T, T)."""
        units = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
        with torch.autocast(q.device.type, enabled=False):
            return self._mix(q, k, units, self.new_state(), None, 0.0)

    def attention_parts(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """`exact`: softmax attention (B, H, T, T); `error`: how far each row is from it (B, H, T), from 0 to 1.

        The error is the total variation distance, the share of attention that went elsewhere.
        """
        exact = softmax_weights(q.float(), repeat_heads(k, q.shape[1]).float())
        return {"exact": exact, "error": (self.attention_map(q, k, x) - exact).abs().sum(-1) / 2}

    def new_state(self) -> PerformerState:
        return PerformerState(0 if "window" in self.disabled else self.config.window)

    def grows(self) -> bool:
        return False

    def steady(self, state: State) -> dict[str, Tensor] | None:
        apart = state.record_past or state.behind or self.disabled
        if apart or state.window != self.config.window or state.least < max(1, state.window):
            return None
        state.close_ring(self.layer.num_kv_heads)
        names = ["sums"] if self.features is not None else []
        names += ["recent_keys", "recent_values"] if state.window else ["one"]
        names += [] if state.settled or state.peaks is None else ["peaks"]
        tensors = {name: getattr(state, name) for name in names}
        return None if None in tensors.values() else tensors

    def keys_read(self, position: int) -> int:
        """The window's keys, and once a key has left it, the m rows of the state."""
        exact = min(position + 1, self.config.window)
        return exact + (self.config.num_features if position >= self.config.window else 0)

    def operations(self, length: int) -> int:
        width, num, window = self.layer.head_dim, self.config.num_features, self.config.window
        chunk = min(self.config.chunk_size, length)
        linear = self.features.operations() + 2 * chunk * (num + width) + 2 * 2 * num * width if num else 0
        exact = 2 * 2 * (window + min(chunk, max(16, window))) * width if window else 0
        return self.layer.num_heads * length * (linear + exact)

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "features."
        if self.features is None:
            return {name: t for name, t in weights.items() if name != "mix" and not name.startswith(prefix)}
        features = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        return weights | {prefix + name: t for name, t in self.features.grown(features).items()}

    def redraw(self, seed: int) -> None:
        """New random projections; nothing where the feature map is learned."""
        if isinstance(self.features, RandomMap):
            self.features.redraw(seed)

    def after_step(self, step: int) -> None:
        """What the trainer calls after optimiser step `step`, counted from 1: redraws when it is time to."""
        every = self.config.redraw_every
        if every and step % every == 0:
            self.redraw(self.config.seed + step // every)
