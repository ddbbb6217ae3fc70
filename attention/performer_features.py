"""Feature maps of linear attention: random ones, and one to be learned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mechanism import LayerShape, seeded_generator, traced, writes_in_place
from .performer_kernel import Scaled, ScaledOne, Steps, exp_, running_maximum
from .state import State

MAX_SHIFT = 80.0  # a key of log-feature −80, beside its scale, is still a normal number
HEADROOM = 60.0  # features up to e^60, their products and sums over keys stay far from float32's e^88
KEY_CAP = 15.0  # learned key features lie between e^−15 and e^15
MAX_RATE = 0.7  # fastest fading; over half a chunk of 128 tokens it amounts to e^45
RELU_EPSILON = 1e-3  # keeps the normaliser of `relu` positive


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


class FeatureOptions(Protocol):
    """The options of `PerformerConfig` that a layer's feature map reads; `num_features` is the layer's own number."""

    num_features: int
    hidden: int
    fade: bool
    orthogonal: bool
    hyperbolic: bool
    window: int
    seed: int


class FeatureState(State):
    """What feature maps remember of the keys before.

    Attributes:
        peaks: largest log-features of those keys (B, H, 1, m); `favor` only, whose sums are on a scale that they set.
        settled: whether that scale is the usual one in all rows; then it stays, and the peaks need not be followed.
        kept: what a feature map keeps for single steps; the same for all rows.
    """

    batched = ("peaks",)

    def __init__(self) -> None:
        super().__init__()
        self.peaks: Tensor | None = None
        self.settled = False
        self.kept: list[Tensor] | None = None


class FeatureMap(nn.Module, ABC):
    """φ, by way of its logarithm.

    Attributes:
        absolute: whether φ(q)·φ(k) stands for exp(q·k/√D) itself; otherwise for a weight beside a typical key's, so
            that what all keys of a query have in common, which softmax does not see, need not be learned.
    """

    absolute: ClassVar[bool] = False
    config: FeatureOptions

    def _shares(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """exp of (…, m) over a number for each query, which cancels, and the logs (…, 1) of these numbers."""
        top = logs.detach().amax(-1, keepdim=True)
        return exp_(logs - top), top

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """log φ (B, H, T, m) of queries and of keys (B, H, T, D)."""

    def scale(self, q: Tensor, k: Tensor, steps: Steps, state: FeatureState) -> Scaled:
        """φ in chunks, on a scale that float32 can hold.

        What a query is divided by depends on no later key, so that no result does, to the last bit.

        Args:
            q, k: (B, H, N C, D).
            steps: which are real; the features of other keys are 0.
            state: what came before.
        """
        q_log, k_log = (steps.chunked(t) for t in self(q, k))
        return Scaled(*self._shares(q_log), steps.real(exp_(k_log), 0.0))

    def scale_one(self, q: Tensor, k: Tensor, state: FeatureState) -> ScaledOne:
        """`scale` for one token, q and k (B, H, 1, D)."""
        q_log, k_log = self(q, k)
        return ScaledOne(q_log, k_log.exp())

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a smaller map as weights of this one, which compute nearly the same; others as they are."""
        return weights

    @abstractmethod
    def operations(self) -> int:
        """Floating-point operations for the features of one query and one key of one head."""


class RandomMap(FeatureMap):
    """Random features of `relu` (arXiv 2009.14794, Section 2.2); ω (projections, D) is one for all heads."""

    def __init__(self, config: FeatureOptions, layer: LayerShape, projections: int | None = None):
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

    absolute = True

    def __init__(self, config: FeatureOptions, layer: LayerShape):
        super().__init__(config, layer, config.num_features // 2 if config.hyperbolic else config.num_features)

    def _log_features(self, x: Tensor) -> Tensor:
        half_square = (x * x).sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        return self._less(self._projected(x), half_square + math.log(self.config.num_features) / 2)

    def _projected(self, x: Tensor) -> Tensor:
        """ωᵀx for each ω."""
        return x @ (self.omega.float().T * x.shape[-1] ** -0.25)

    def _less(self, u: Tensor, x: Tensor | float) -> Tensor:
        """u − x, or [u − x, −u − x] for hyperbolic features."""
        if not self.config.hyperbolic:
            return u - x
        if not writes_in_place():
            return torch.cat([u - x, -u - x], -1)
        both = u.new_empty(*u.shape[:-1], 2 * u.shape[-1])
        first, second = both.chunk(2, -1)
        torch.sub(u, x, out=first)
        torch.sub(-x, u, out=second)
        return both

    def _usual(self, state: FeatureState) -> Tensor:
        """`_usual_scale`, computed once for a state."""
        if state.kept is None:
            state.kept = [self._usual_scale()]
        return state.kept[0]

    @torch.no_grad()
    def _usual_scale(self) -> Tensor:
        """The scale (m,) on which the features of all possible keys are at most e^HEADROOM.

        A log-feature is at most |ω|²/2 (where x = ω), less log(m)/2.
        """
        highest = (self.omega.float().square().sum(-1) - math.log(self.config.num_features)) / 2
        usual = (highest - HEADROOM).clamp_min(0)
        return torch.cat([usual, usual]) if self.config.hyperbolic else usual

    @staticmethod
    def _reference(peaks: Tensor, usual: Tensor) -> Tensor:
        """The scale for keys whose largest log-features are `peaks` (…, m) so far: lower where all are tiny."""
        return torch.minimum(peaks + MAX_SHIFT, usual)

    def scale(self, q: Tensor, k: Tensor, steps: Steps, state: FeatureState) -> Scaled:
        """On the usual scale, once a key of every row is not tiny on it; before that, on lower ones.

        These come from a running maximum of each log-feature of the keys: a chunk's from the maximum before it and
        from its first key. Exact unless a key exceeds all before it by more than MAX_SHIFT + HEADROOM in the same
        chunk.
        """
        usual = self._usual(state)
        if self.config.window:  # absolute: |q|²/2 counts
            q_log = steps.chunked(self._log_features(q))
        else:
            q_log = steps.chunked(self._less(self._projected(q), 0.0))
        k_log = steps.real(steps.chunked(self._log_features(k)), -torch.inf)
        if not state.settled and steps.lengths is None and isinstance(steps.missing, int) and not traced():
            self._settle(state, self._first_keys(k_log.detach(), steps.missing)[:, :, :1], usual)
        if state.settled:
            if usual.any():
                q_log, k_log = q_log + usual, k_log - usual
            return Scaled(*self._shares(q_log), exp_(k_log))
        with torch.no_grad():
            peaks = running_maximum(torch.cat([state.peaks, k_log.amax(-2)], 2))
            visible = torch.maximum(peaks[:, :, :-1], self._first_keys(k_log, steps.missing))
            reference = self._reference(torch.cat([visible, peaks[:, :, -1:]], 2), usual)[:, :, :, None]
            factors = (reference[:, :, :-1] - reference[:, :, 1:]).exp()
            entry = (self._reference(state.peaks, usual) - reference[:, :, 0]).exp()
        self._settle(state, peaks[:, :, -1:], usual)
        k = exp_((k_log - reference[:, :, :-1]).clamp_(max=HEADROOM))
        return Scaled(*self._shares(q_log + reference[:, :, :-1]), k, entry, factors)

    def _settle(self, state: FeatureState, peaks: Tensor, usual: Tensor) -> None:
        """Takes up peaks (B, H, 1, m), and whether they have reached the usual scale in all rows, for good.

        Never on an accelerator, which would have to be waited for, nor in a compiled graph.
        """
        state.peaks = torch.maximum(state.peaks, peaks)
        if peaks.device.type == "cpu" and not traced():
            state.settled = bool((state.peaks + MAX_SHIFT >= usual).all())

    def scale_one(self, q: Tensor, k: Tensor, state: FeatureState) -> ScaledOne:
        q_log, k_log = self(q, k)
        usual = self._usual(state)
        if state.settled:
            return ScaledOne(q_log + usual, (k_log - usual).exp_())
        before = self._reference(state.peaks, usual)
        state.peaks = torch.maximum(state.peaks, k_log)
        reference = self._reference(state.peaks, usual)
        return ScaledOne(q_log + reference, (k_log - reference).exp_(), entry=(before - reference).exp_())

    @staticmethod
    def _first_keys(k_log: Tensor, missing: int | Tensor) -> Tensor:
        """(B, H, N, m) largest log-features among each chunk's first key and the row's first key."""
        first = k_log[:, :, :, 0]
        row = k_log.flatten(2, 3)
        if isinstance(missing, int):
            if not traced():
                return torch.maximum(first, row[:, :, missing : missing + 1])
            missing = torch.full((len(row),), missing, device=row.device)
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

    def __init__(self, config: FeatureOptions, layer: LayerShape):
        super().__init__()
        self.config = config
        self.layer = layer
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
        x = torch.cat([q, k], 1).transpose(0, 1)
        u = torch.baddbmm(self.bias.float(), x.flatten(1, 2), self.weight.float()).view(*x.shape[:3], -1)
        u = u.transpose(0, 1)
        if self.config.hidden:
            u = u + self._correction(x.transpose(0, 1), slice(None))
        q_log, k_log = u.chunk(2, 1)
        return q_log, k_log.clamp(-KEY_CAP, KEY_CAP)

    def _linear(self, x: Tensor, heads: slice) -> Tensor:
        """W x + V gelu(U x) (B, H, T, m), for the heads of queries, of keys, or of both."""
        u = x @ self.weight[heads].float()
        return u + self._correction(x, heads) if self.config.hidden else u

    def _correction(self, x: Tensor, heads: slice) -> Tensor:
        """V gelu(U x) (B, H, T, m)."""
        return F.gelu(x @ self.inner[heads].float()) @ self.outer[heads].float()

    def rates(self) -> Tensor:
        """r (H, 1, m), what the logarithm of each feature loses a token."""
        return MAX_RATE * self.rate.float().sigmoid()

    def scale(self, q: Tensor, k: Tensor, steps: Steps, state: FeatureState) -> Scaled:
        """Fading: e^−r(i−j) = e^−r(i−h) e^r(j−h), with h the middle of the chunk, so that neither factor is large."""
        heads = q.shape[1]
        q_bias, k_bias = self.bias.float()[:, :, None].split(heads)  # (H, 1, 1, m)
        q_log = steps.chunked(self._linear(q, slice(heads)))
        k_log = steps.chunked(self._linear(k, slice(heads, None))).clamp(-KEY_CAP - k_bias, KEY_CAP - k_bias)
        if not self.config.fade:
            return Scaled(*self._shares(q_log + q_bias), steps.real(exp_(k_log.add_(k_bias)), 0.0))
        fading, shift = self._fading(steps, state)
        k_features = steps.real(exp_(k_log.add_(k_bias + fading)), 0.0)
        factors = (-self.rates()[:, None] * steps.counts(q.device)).exp().expand(-1, -1, q_log.shape[2], -1, -1)
        return Scaled(*self._shares(q_log + (q_bias - fading)), k_features, 1 / shift, factors, shift)

    def _fading(self, steps: Steps, state: FeatureState) -> tuple[Tensor, Tensor]:
        """r (p − h) (H, 1, C, m) for the positions p in a chunk, and e^(r h) (H, 1, m)."""
        rates, middle = self.rates(), (steps.size - 1) / 2
        offsets = torch.arange(steps.size, device=rates.device)[:, None] - middle
        return (rates * offsets)[:, None], (rates * middle).exp()

    def scale_one(self, q: Tensor, k: Tensor, state: FeatureState) -> ScaledOne:
        scaled = super().scale_one(q, k, state)
        if not self.config.fade:
            return scaled
        if state.kept is None:
            state.kept = [(-self.rates()).exp()]
        return scaled._replace(exit=state.kept[0])

    @torch.no_grad()
    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features are repeated, and the copies of one share its part; a little noise sets the copies apart."""
        config, old = self.config, weights.get("weight")
        if old is None or old.shape[-1] >= config.num_features:
            return weights
        source = torch.arange(config.num_features) % old.shape[-1]
        larger = {name: t if name == "inner" else t[..., source] for name, t in weights.items()}
        larger["bias"][self.layer.num_heads :] -= source.bincount()[source].log().to(old)
        generator = seeded_generator(config.seed, self.layer.layer_idx)
        noise = torch.randn(larger["weight"].shape, generator=generator).to(old)
        noise[..., : old.shape[-1]] = 0.0
        larger["weight"] += 0.1 * old.shape[1] ** -0.25 * noise
        return larger

    def operations(self) -> int:
        width, num, hidden = self.weight.shape[1], self.config.num_features, self.config.hidden
        return 2 * 2 * (width * num + hidden * (width + num))


FEATURE_MAPS = {"favor": FavorMap, "relu": RandomMap, "learned": LearnedMap}
