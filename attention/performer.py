"""Performer: linear attention through feature maps, random or learned, with an optional exact window."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .mechanism import LayerShape, Mechanism, MechanismConfig, repeat_heads, seeded_generator
from .reference import softmax_weights
from .state import State

CPU_SEGMENT, SEGMENT = 384, 8192  # tokens worked on at a time: on a CPU what is temporary must fit its cache
NOTHING = -1e30  # log of a feature that no key has; finite, so that differences of two are not NaN
MAX_SHIFT = 80.0  # a first key of log-feature −80 is still a normal number
HEADROOM = 60.0  # features up to e^60, their products and sums over keys stay far from float32's e^88
KEY_CAP = 15.0  # learned key features lie between e^−15 and e^15
MAX_RATE = 0.7  # fastest fading; over half a chunk of 128 tokens it amounts to e^45
RELU_EPSILON = 1e-3  # keeps the normaliser of `relu` positive


@dataclass(frozen=True, kw_only=True)
class PerformerConfig(MechanismConfig):
    """Options of linear attention, Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j).

    Attributes:
        feature_map: φ. `favor`: positive random features, an unbiased estimate of exp(q·k/√D) (arXiv 2009.14794);
            `relu`: rectified random projections (same paper); `learned`: exp of a learned map, one per layer and head,
            made to be fitted to softmax attention (after arXiv 2402.04347).
        num_features: m, the number of features; even for `favor` with `hyperbolic`.
        hidden: width of a hidden layer inside the learned map; 0 leaves it linear.
        fade: learned features fade with distance, each at its own learned rate (as in arXiv 2312.06635).
        orthogonal: draw the random projections orthogonal in blocks of D, which lowers the variance.
        hyperbolic: `favor` with exp(±ωᵀx) for half as many ω, which lowers the variance.
        redraw_every: draw new random projections every so many training steps; 0: never.
        window: w, the number of last keys (the query's own among them) that get exact softmax attention; the linear
            part carries the older ones, under one normaliser (arXiv 2410.10254). 0: the linear part carries all.
        chunk_size: tokens that the kernel mixes by one matrix product; changes speed, not results.
        seed: of the random projections and the learned map's start.
    """

    method: ClassVar[str] = "performer"
    description: ClassVar[str] = (
        "The past is folded into a summary of fixed size that each token adds to, so a token costs the same at any "
        "length; the nearest tokens can stay exact."
    )

    feature_map: Literal["favor", "relu", "learned"] = "learned"
    num_features: int = 64
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
        if self.num_features < 1:
            problems.append(f"num_features is {self.num_features}; it must be at least 1")
        if self.feature_map == "favor" and self.hyperbolic and self.num_features % 2:
            problems.append(f"num_features is {self.num_features}; with hyperbolic features it must be even")
        for name in ("hidden", "redraw_every", "window", "seed"):
            if (value := getattr(self, name)) < 0:
                problems.append(f"{name} is {value}; it must not be negative")
        if not 1 <= self.chunk_size <= 128:
            problems.append(f"chunk_size is {self.chunk_size}; it must lie between 1 and 128")
        if self.redraw_every and self.feature_map == "learned":
            problems.append("redraw_every is set, but a learned feature map has nothing random to redraw")
        return problems

    def build(self, layer: LayerShape) -> PerformerAttention:
        return PerformerAttention(self, layer)


class PerformerState(State):
    """The past as sums over its keys, and the last w keys and values where there is a window; all float32.

    Attributes:
        sums: Σ φ(k_j) v_jᵀ (B, H, m, D) over the keys that have left the window.
        norms: Σ φ(k_j)ᵀ (B, H, 1, m) over the same keys.
        peaks: largest log-features of those keys (B, H, 1, m); `favor` only, which keeps its sums relative to them.
        recent_keys, recent_values: (B, H_kv, w, D), the newest last; rows with fewer tokens have zeros in front.
        fading: what the learned map keeps for single steps; the same for all rows.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.sums: Tensor | None = None
        self.norms: Tensor | None = None
        self.peaks: Tensor | None = None
        self.recent_keys: Tensor | None = None
        self.recent_values: Tensor | None = None
        self.fading: list[Tensor] | None = None

    def missing(self) -> int | Tensor:
        """How many slots of the window are still empty; (B,) where the rows differ."""
        if self.lengths is None:
            return max(0, self.window - self.seen)
        return (self.window - self.lengths).clamp_min(0)

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window's keys and values followed by the new ones, (B, H_kv, w + T, D)."""
        if self.recent_keys is None:
            return F.pad(k, (0, 0, self.window, 0)), F.pad(v, (0, 0, self.window, 0))
        return torch.cat([self.recent_keys, k], 2), torch.cat([self.recent_values, v], 2)

    def keep_recent(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> None:
        """Keeps the last w real tokens of each row of what `join` returned, of whose new tokens `lengths` are real."""
        if lengths is None:
            start = keys.shape[2] - self.window
            self.recent_keys, self.recent_values = keys[:, :, start:].clone(), values[:, :, start:].clone()
            return
        index = (lengths[:, None] + torch.arange(self.window, device=keys.device))[:, None, :, None]
        self.recent_keys = keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3]))
        self.recent_values = values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))


def random_projections(num: int, width: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Gaussian directions ω (num, width) in float32.

    Orthogonal ones come in blocks of `width` (arXiv 2009.14794, Section 2.4): directions uniform on the sphere and at
    right angles inside a block, lengths those of independent Gaussian vectors, so that each row is still N(0, I).
    """
    gaussian = torch.randn(num, width, generator=generator)
    if not orthogonal:
        return gaussian
    blocks = torch.randn(math.ceil(num / width), width, width, generator=generator)
    q, r = torch.linalg.qr(blocks)
    directions = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[:, None]  # signs that make Q uniform
    return directions.transpose(-1, -2).reshape(-1, width)[:num] * gaussian.norm(dim=1, keepdim=True)


class Steps(NamedTuple):
    """Which of the T steps of a segment are real.

    Attributes:
        length: T.
        missing: how many of a row's first keys are empty, one number or (B,).
        lengths: (B,) how many steps of each row are real, the first ones; None: all.
    """

    length: int
    missing: int | Tensor = 0
    lengths: Tensor | None = None

    def hidden(self, device: torch.device) -> Tensor | None:
        """(1 or B, T) which keys do not count, or None where all do."""
        if isinstance(self.missing, int) and not self.missing and self.lengths is None:
            return None
        slots = torch.arange(self.length, device=device)[None]
        hidden = slots < (self.missing if isinstance(self.missing, int) else self.missing[:, None])
        return hidden if self.lengths is None else hidden | (slots >= self.lengths[:, None])

    def counts(self, size: int) -> list[int] | list[Tensor]:
        """How many steps are real in each chunk of `size`: numbers, or (B, 1, 1, 1)."""
        starts = range(0, self.length, size)
        if self.lengths is None:
            return [min(size, self.length - start) for start in starts]
        return [(self.lengths - start).clamp(0, size)[:, None, None, None] for start in starts]


class Scaled(NamedTuple):
    """Features in chunks, each on the scale of its chunk, and how the sums over keys change scale between chunks.

    Attributes:
        q: (B, H, N, C, m).
        top: (B, H, N, C, 1) logs of what the features of each query were divided by.
        k: (B, H, N, C, m).
        entry: (·, H, 1, m) factor of the state's sums before the first chunk, or None for 1.
        factors: for each of the N chunks the factor (·, H, 1, m) of the sums after it, or None for 1.
        exit: (H, 1, m) factor of the sums that go into the state, or None for 1.
    """

    q: Tensor
    top: Tensor
    k: Tensor
    entry: Tensor | None = None
    factors: Sequence[Tensor] | None = None
    exit: Tensor | None = None


def _exp_relative(logs: Tensor) -> tuple[Tensor, Tensor]:
    """exp of (…, m), divided by the largest of each m, and the logs (…, 1) of the divisors."""
    top = logs.detach().amax(-1, keepdim=True)
    return (logs - top).exp_(), top


class FeatureMap(nn.Module, ABC):
    """φ, by way of its logarithm."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """log φ (B, H, T, m) of queries and of keys (B, H, T, D)."""

    def scale(self, q_log: Tensor, k_log: Tensor, steps: Steps, state: PerformerState) -> Scaled:
        """Takes exp, on a scale that float32 can hold.

        What a query is divided by depends on no later key, so that no result does, to the last bit.

        Args:
            q_log, k_log: (B, H, N, C, m), the latter −∞ where there is no key.
            steps: which are real.
            state: what came before.
        """
        return Scaled(*_exp_relative(q_log), k_log.exp())

    def scale_one(self, q_log: Tensor, k_log: Tensor, state: PerformerState) -> Scaled:
        """`scale` for one token, q_log and k_log (B, H, 1, m)."""
        return Scaled(*_exp_relative(q_log), k_log.exp())

    @abstractmethod
    def operations(self) -> int:
        """Floating-point operations for the features of one query and one key of one head."""


class RandomMap(FeatureMap):
    """Random features of `relu` (arXiv 2009.14794, Section 2.2); ω (projections, D) is one for all heads."""

    def __init__(self, config: PerformerConfig, layer: LayerShape, projections: int | None = None):
        super().__init__()
        self.config = config
        self.layer = layer
        self.projections = projections or config.num_features
        self.register_buffer("omega", self._draw(config.seed))

    def _draw(self, seed: int) -> Tensor:
        generator = seeded_generator(seed, self.layer.layer_idx)
        return random_projections(self.projections, self.layer.head_dim, self.config.orthogonal, generator)

    def redraw(self, seed: int) -> None:
        """Replaces ω by the one that `seed` gives."""
        self.omega.copy_(self._draw(seed))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._log_features(q), self._log_features(k)

    def _log_features(self, x: Tensor) -> Tensor:
        u = x @ (self.omega.float().T * x.shape[-1] ** -0.25)
        return ((F.relu(u) + RELU_EPSILON) * self.config.num_features**-0.5).log()

    def operations(self) -> int:
        return 2 * 2 * self.omega.numel()


class FavorMap(RandomMap):
    """Positive random features exp(ωᵀx − |x|²/2) / √m, or exp(±ωᵀx − |x|²/2) / √m with half as many ω.

    φ(q)·φ(k) is then an unbiased estimate of exp(q·k/√D) (arXiv 2009.14794, Lemma 1 and Eq. 5).
    """

    def __init__(self, config: PerformerConfig, layer: LayerShape):
        super().__init__(config, layer, config.num_features // 2 if config.hyperbolic else config.num_features)

    def _log_features(self, x: Tensor) -> Tensor:
        omega = self.omega.float() * x.shape[-1] ** -0.25
        if self.config.hyperbolic:
            omega = torch.cat([omega, -omega])
        half_square = x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        return (x @ omega.T).sub_(half_square + math.log(self.config.num_features) / 2)

    @torch.no_grad()
    def _reference(self, peaks: Tensor) -> Tensor:
        """The scale for keys whose largest log-features are `peaks` (…, m) so far.

        A log-feature is at most |ω|²/2 (where x = ω), so one scale, a little below that, does for most keys to come.
        Where all keys so far are tiny beside it, the scale stays near them instead.
        """
        highest = (self.omega.float().square().sum(-1) - math.log(self.config.num_features)) / 2
        if self.config.hyperbolic:
            highest = torch.cat([highest, highest])
        return peaks + (highest - HEADROOM - peaks).clamp(0, MAX_SHIFT)

    def scale(self, q_log: Tensor, k_log: Tensor, steps: Steps, state: PerformerState) -> Scaled:
        """Keeps a running maximum of each log-feature of the keys; a chunk's scale comes from it and its first key.

        Exact unless a key exceeds all before it by more than MAX_SHIFT + HEADROOM in the same chunk.
        """
        with torch.no_grad():
            peaks = torch.cat([state.peaks, k_log.amax(-2)], 2).cummax(2).values
            visible = torch.maximum(peaks[:, :, :-1], self._first_keys(k_log, steps.missing))
            reference = self._reference(torch.cat([visible, peaks[:, :, -1:]], 2))[:, :, :, None]
            factors = (reference[:, :, :-1] - reference[:, :, 1:]).exp().unbind(2)
            entry = (self._reference(state.peaks) - reference[:, :, 0]).exp()
        state.peaks = peaks[:, :, -1:].clone()
        k = (k_log - reference[:, :, :-1]).clamp_(max=HEADROOM).exp_()
        return Scaled(*_exp_relative(q_log + reference[:, :, :-1]), k, entry, factors)

    def scale_one(self, q_log: Tensor, k_log: Tensor, state: PerformerState) -> Scaled:
        with torch.no_grad():
            before = self._reference(state.peaks)
            state.peaks = torch.maximum(state.peaks, k_log)
            reference = self._reference(state.peaks)
        return Scaled(*_exp_relative(q_log + reference), (k_log - reference).exp_(), (before - reference).exp_())

    @staticmethod
    def _first_keys(k_log: Tensor, missing: int | Tensor) -> Tensor:
        """(B, H, N, m) largest log-features among each chunk's first key and the row's first key."""
        first = k_log[:, :, :, 0]
        row = k_log.flatten(2, 3)
        if isinstance(missing, int):
            return torch.maximum(first, row[:, :, missing : missing + 1])
        index = missing.clamp(max=row.shape[2] - 1)[:, None, None, None]
        return torch.maximum(first, row.gather(2, index.expand(-1, row.shape[1], 1, row.shape[3])))


class LearnedMap(FeatureMap):
    """exp(W x + b), or exp(W x + b + V gelu(U x)), for queries and keys and for each head its own.

    A query's features matter only relative to one another, unless there is a window; a key's lie within e^±15. They
    start as exp(±x), the start of Hedgehog (arXiv 2402.04347). With `fade`, feature f of a key counts e^−r_f less
    with every token after it, or after it left the window.

    Attributes:
        weight: W (2 H, D, m), for the heads of the queries, then for those of the keys.
        bias: b (2 H, 1, m).
        inner, outer: U (2 H, D, hidden) and V (2 H, hidden, m).
        rate: (H, 1, m), by which r = 0.7 σ(rate).
    """

    def __init__(self, config: PerformerConfig, layer: LayerShape):
        super().__init__()
        self.config = config
        heads, width, num = layer.num_heads, layer.head_dim, config.num_features
        generator = seeded_generator(config.seed, layer.layer_idx)
        axes = torch.eye(width)
        start = torch.cat([axes, -axes])[torch.arange(num) % (2 * width)].T
        noise = 0.1 * torch.randn(2 * heads, width, num, generator=generator)
        self.weight = nn.Parameter(width**-0.25 * (start + noise))
        self.bias = nn.Parameter(torch.zeros(2 * heads, 1, num))
        if config.hidden:
            inner = torch.randn(2 * heads, width, config.hidden, generator=generator)
            self.inner = nn.Parameter(width**-0.75 * inner)
            self.outer = nn.Parameter(torch.zeros(2 * heads, config.hidden, num))
        if config.fade:
            rates = torch.logspace(math.log10(0.5), -4, num)  # from tokens to the whole context
            order = torch.stack([torch.randperm(num, generator=generator) for _ in range(heads)])
            self.rate = nn.Parameter((rates[order][:, None] / MAX_RATE).logit())

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([q, k], 1)
        u = (x @ self.weight.float()).add_(self.bias.float())
        if self.config.hidden:
            u += F.gelu(x @ self.inner.float()) @ self.outer.float()
        q_log, k_log = u.chunk(2, 1)
        return q_log, k_log.clamp(-KEY_CAP, KEY_CAP)

    def rates(self) -> Tensor:
        """r (H, 1, m), what the logarithm of each feature loses a token."""
        return MAX_RATE * self.rate.float().sigmoid()

    def scale(self, q_log: Tensor, k_log: Tensor, steps: Steps, state: PerformerState) -> Scaled:
        """Fading: e^−r(i−j) = e^−r(i−h) e^r(j−h), with h the middle of the chunk, so that neither factor is large."""
        if not self.config.fade:
            return super().scale(q_log, k_log, steps, state)
        rates, size = self.rates(), q_log.shape[3]
        middle = (size - 1) / 2
        fading = (rates * (torch.arange(size, device=rates.device)[:, None] - middle))[:, None]  # (H, 1, C, m)
        factors = [(-rates * count).exp() for count in steps.counts(size)]
        shift = (rates * middle).exp()
        return Scaled(*_exp_relative(q_log - fading), (k_log + fading).exp_(), 1 / shift, factors, shift)

    def scale_one(self, q_log: Tensor, k_log: Tensor, state: PerformerState) -> Scaled:
        if not self.config.fade:
            return super().scale_one(q_log, k_log, state)
        if state.fading is None:
            state.fading = [(-self.rates()).exp()]
        return Scaled(*_exp_relative(q_log), k_log.exp(), factors=state.fading)

    def operations(self) -> int:
        width, num, hidden = self.weight.shape[1], self.config.num_features, self.config.hidden
        return 2 * 2 * (width * num + hidden * (width + num))


FEATURE_MAPS = {"favor": FavorMap, "relu": RandomMap, "learned": LearnedMap}


def chunked(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """(B, H, T, ·) in chunks (B, H, N, size, ·), the last one filled up with `fill`."""
    padding = -x.shape[2] % size
    if padding:
        x = F.pad(x, (0, 0, 0, padding), value=fill)
    return x.unflatten(2, (-1, size))


def joined(x: Tensor, length: int) -> Tensor:
    """Chunks (B, H, N, C, ...) as (B, H, length, ...), without what `chunked` filled up."""
    x = x.flatten(2, 3)
    return x if x.shape[2] == length else x[:, :, :length]


def _rescaled(sums: Tensor, norms: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums (B, H, m, D) and norms (B, H, 1, m), feature by feature times a factor (·, H, 1, m), None for 1."""
    return (sums, norms) if factor is None else (sums * factor.transpose(-1, -2), norms * factor)


def linear_chunks(scaled: Scaled, v: Tensor, sums: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal linear attention in chunks: O_c = tril(Q_c K_cᵀ) V_c + Q_c S, then S ← (S + K_cᵀ V_c) · factor_c.

    Args:
        scaled: features.
        v: (B, H, N, C, D).
        sums, norms: S (B, H, m, D) and Σ φ(k)ᵀ (B, H, 1, m) before the first chunk.

    Returns:
        Numerator (B, H, N, C, D), denominator (B, H, N, C), and `sums` and `norms` after the last chunk.
    """
    q, k = scaled.q, scaled.k
    new_sums, new_norms = (k.transpose(-1, -2) @ v).unbind(2), k.sum(-2, keepdim=True).unbind(2)
    sums_before, norms_before = [], []
    for chunk in range(q.shape[2]):
        sums_before.append(sums)
        norms_before.append(norms)
        factor = None if scaled.factors is None else scaled.factors[chunk]
        sums, norms = _rescaled(sums + new_sums[chunk], norms + new_norms[chunk], factor)
    inside = (q @ k.transpose(-1, -2)).tril_()
    numerator = (inside @ v).add_(q @ torch.stack(sums_before, 2))
    denominator = inside.sum(-1).add_((q * torch.stack(norms_before, 2)).sum(-1))
    return numerator, denominator, sums, norms


def window_attention(
    q: Tensor, keys: Tensor, values: Tensor, window: int, missing: int | Tensor, block: int, dropout: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of query t over keys t + 1 to t + w, in blocks of queries.

    Args:
        q: (B, H, T, D).
        keys, values: (B, H, w + T, D), the w before the first query in front.
        window: w.
        missing: how many of a row's first keys are empty, one number or (B,).
        block: queries in a block.
        dropout: of the weights.

    Returns:
        (B, H, T, D) and the logs of the normalisers (B, H, T).
    """
    length = q.shape[2]
    block = min(block, length)
    q = chunked(q * q.shape[-1] ** -0.5, block)
    span, end = window + block, (0, 0, 0, -length % block)
    keys, values = (F.pad(t, end).unfold(2, span, block) for t in (keys, values))  # (B, H, N, D, span)
    scores = (q @ keys).masked_fill(~_in_window(q, window, missing), -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    mixed = F.dropout(weights, dropout) @ values.transpose(-1, -2) / total
    logs = (top + total.log()).squeeze(-1)
    return joined(mixed, length), joined(logs, length)


def _in_window(q: Tensor, window: int, missing: int | Tensor) -> Tensor:
    """(·, 1, N or 1, block, span) which of its block's keys a query may read, for q (B, H, N, block, D)."""
    number, block = q.shape[2:4]
    slots, rows = torch.arange(window + block, device=q.device), torch.arange(block, device=q.device)[:, None]
    near = (slots > rows) & (slots <= rows + window)
    if isinstance(missing, int):
        if not missing:
            return near[None, None, None]
        missing = torch.tensor([missing], device=q.device)
    position = slots + block * torch.arange(number, device=q.device)[:, None]
    return near & (position >= missing[:, None, None])[:, None, :, None]


class PerformerAttention(Mechanism):
    """Linear attention, with exact softmax over the last keys where the config has a window.

    Works on segments of tokens, each after the state that the segments before left, so a prefill is the same code as
    a block of tokens in decoding. In training, dropout falls on the window's weights; the linear part has no weights
    to drop.

    `disable("window")` lets the linear part carry every key, to see what it does on its own.
    """

    def __init__(self, config: PerformerConfig, layer: LayerShape):
        super().__init__(config, layer)
        self.branches = ("linear", "window") if config.window else ("linear",)
        self.features: FeatureMap = FEATURE_MAPS[config.feature_map](config, layer)
        if config.window:  # log of the linear part's weight beside the window's
            self.mix = nn.Parameter(torch.zeros(layer.num_heads))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: PerformerState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        dropout = self.layer.dropout if self.training else 0.0
        return self._mix(q, k, v, self.new_state() if state is None else state, lengths, dropout).to(v.dtype)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, lengths: Tensor | None, dropout: float
    ) -> Tensor:
        q, k, v = q.float(), k.float(), v.float()
        if q.shape[2] == 1 and state.seen and state.lengths is None and lengths is None and not self.disabled:
            output = self._step(q, k, v, state)
            state.advance(1, None)
            return output
        segment = CPU_SEGMENT if q.device.type == "cpu" else SEGMENT
        whole = None if torch.is_grad_enabled() or q.shape[2] <= segment else v.new_empty(*q.shape[:3], v.shape[3])
        outputs, start = [], 0
        for part in zip(*(t.split(segment, 2) for t in (q, k, v)), strict=True):
            size = part[0].shape[2]
            real = None if lengths is None else (lengths - start).clamp(0, size)
            output = self._segment(*part, state, real, dropout)
            state.advance(size, real)
            if whole is None:
                outputs.append(output)
            else:
                whole[:, :, start : start + size] = output
            start += size
        if whole is not None:
            return whole
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def _segment(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, lengths: Tensor | None, dropout: float
    ) -> Tensor:
        """Output (B, H, T, D) for tokens that follow those in the state, which takes them up."""
        heads, length = q.shape[1:3]
        if not state.window:
            return self._linear(q, k, v, state, Steps(length, 0, lengths))[0]
        missing = state.missing()
        keys, values = state.join(k, v)
        state.keep_recent(keys, values, lengths)
        keys, values = repeat_heads(keys, heads), repeat_heads(values, heads)
        block = min(self.config.chunk_size, max(16, state.window))
        near, near_log = window_attention(q, keys, values, state.window, missing, block, dropout)
        if isinstance(missing, int) and missing >= length:
            return near
        steps = Steps(length, missing, lengths)
        far, far_log = self._linear(q, keys[:, :, :length], values[:, :, :length], state, steps)
        share = torch.sigmoid(far_log + self.mix.float()[:, None] - near_log)
        return torch.lerp(near, far, share[..., None])

    def _linear(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, steps: Steps
    ) -> tuple[Tensor, Tensor | None]:
        """The linear part: query t reads the state's sums and the keys up to t, which the state takes up.

        Args:
            q: (B, H, T, D).
            k, v: (B, H_kv, T, D).
            steps: which are real.

        Returns:
            (B, H, T, D), zero where there was nothing to read, and, where there is a window, the logs of the
            normalisers (B, H, T).
        """
        heads, length = q.shape[1:3]
        v = repeat_heads(v, heads)
        if "linear" in self.disabled:
            return torch.zeros_like(v), v.new_full(v.shape[:3], -torch.inf)
        q_log, k_log = self.features(q, repeat_heads(k, heads))
        if (hidden := steps.hidden(q.device)) is not None:
            k_log = k_log.masked_fill(hidden[:, None, :, None], -torch.inf)
        if state.sums is None:
            self._start(state, v)
        size = min(self.config.chunk_size, length)
        scaled = self.features.scale(chunked(q_log, size), chunked(k_log, size, -torch.inf), steps, state)
        sums, norms = _rescaled(state.sums, state.norms, scaled.entry)
        v = chunked(v, size).contiguous()
        numerator, denominator, sums, norms = linear_chunks(scaled, v, sums, norms)
        state.sums, state.norms = _rescaled(sums, norms, scaled.exit)
        bounded = denominator.clamp_min(torch.finfo(denominator.dtype).tiny)
        mixed = joined(numerator.div_(bounded[..., None]), length)
        if not state.window:
            return mixed, None
        logs = (scaled.top.squeeze(-1) + bounded.log()).masked_fill(denominator == 0, -torch.inf)
        return mixed, joined(logs, length)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState) -> Tensor:
        """What `_segment` gives for a single token of rows of one length, in few operations."""
        heads, missing = q.shape[1], state.missing()
        if not state.window:
            return self._linear_step(q, repeat_heads(k, heads), repeat_heads(v, heads), state)[0]
        keys, values = state.join(k, v)
        state.recent_keys, state.recent_values = keys[:, :, 1:], values[:, :, 1:]
        keys, values = repeat_heads(keys, heads), repeat_heads(values, heads)
        if missing:
            return scaled_dot_product_attention(q, keys[:, :, missing:], values[:, :, missing:])
        far, logs = self._linear_step(q, keys[:, :, :1], values[:, :, :1], state)
        # For the key that has left the window, one that stands for the linear part: its score is the log of the
        # linear part's normaliser.
        keys = torch.cat([torch.zeros_like(q), keys[:, :, 1:]], 2)
        values = torch.cat([far, values[:, :, 1:]], 2)
        score = F.pad(logs + self.mix.float()[:, None, None], (0, state.window))
        return scaled_dot_product_attention(q, keys, values, score)

    def _linear_step(self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState) -> tuple[Tensor, Tensor]:
        """What `_linear` gives for one token: (B, H, 1, D) and the logs of the normalisers (B, H, 1, 1)."""
        if state.sums is None:
            self._start(state, v)
        scaled = self.features.scale_one(*self.features(q, k), state)
        sums, norms = _rescaled(state.sums, state.norms, scaled.entry)
        sums, norms = torch.addcmul(sums, scaled.k.transpose(-1, -2), v), norms + scaled.k
        denominator = (scaled.q * norms).sum(-1, keepdim=True)
        mixed = scaled.q @ sums / denominator
        state.sums, state.norms = _rescaled(sums, norms, None if scaled.factors is None else scaled.factors[0])
        return mixed, scaled.top + denominator.log() if state.window else denominator

    def _start(self, state: PerformerState, v: Tensor) -> None:
        """Sums over no keys, for values (B, H, T, D)."""
        batch, heads, _, width = v.shape
        state.sums = v.new_zeros(batch, heads, self.config.num_features, width)
        state.norms = v.new_zeros(batch, heads, 1, self.config.num_features)
        if self.config.feature_map == "favor":
            state.peaks = torch.full_like(state.norms, NOTHING)

    def attention_map(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """What `forward` gives when the value of token j is the j-th unit vector (B, H, T, T)."""
        units = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
        return self._mix(q, k, units, self.new_state(), None, 0.0)

    def attention_parts(self, q: Tensor, k: Tensor, x: Tensor) -> dict[str, Tensor]:
        """`exact`: softmax attention (B, H, T, T); `error`: how far each row is from it (B, H, T), from 0 to 1.

        The error is the total variation distance, the share of attention that went elsewhere.
        """
        exact = softmax_weights(q.float(), repeat_heads(k, q.shape[1]).float())
        return {"exact": exact, "error": (self.attention_map(q, k, x) - exact).abs().sum(-1) / 2}

    def new_state(self) -> PerformerState:
        return PerformerState(0 if "window" in self.disabled else self.config.window)

    def keys_read(self, position: int) -> int:
        """The window's keys, and once a key has left it, the m rows of the state."""
        exact = min(position + 1, self.config.window)
        return exact + (self.config.num_features if position >= self.config.window else 0)

    def operations(self, length: int) -> int:
        width, num, window = self.layer.head_dim, self.config.num_features, self.config.window
        chunk = min(self.config.chunk_size, length)
        linear = self.features.operations() + 2 * chunk * (num + width) + 2 * 2 * num * width
        exact = 2 * 2 * (window + min(chunk, max(16, window))) * width if window else 0
        return self.layer.num_heads * length * (linear + exact)

    def redraw(self, seed: int) -> None:
        """New random projections; nothing where the feature map is learned."""
        if isinstance(self.features, RandomMap):
            self.features.redraw(seed)

    def after_step(self, step: int) -> None:
        """What the trainer calls after optimiser step `step`, counted from 1: redraws when it is time to."""
        every = self.config.redraw_every
        if every and step % every == 0:
            self.redraw(self.config.seed + step // every)
