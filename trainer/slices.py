"""What the means over a text hide: fidelity on tokens that must be looked up, by distance, and by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from .fidelity import Reading

NEAR, MIDDLE, FAR = 64, 256, 1024  # tokens back
FIRST_BUCKET = 128  # positions


@dataclass(frozen=True)
class Slice:
    """Means over some of the predicted tokens of a text.

    A standard error is that of a ratio of sums over blocks, which are taken as drawn independently: for sums x_b of
    values and counts n_b in B blocks, with the mean r = Σ x_b / Σ n_b, √(B/(B−1) · Σ (x_b − r·n_b)²) / Σ n_b
    (Cochran 1977, Sampling Techniques, 6.4). None for a single block.

    Attributes:
        tokens: how many there are.
        base_loss: cross-entropy under the base, nats per token; None where there is no token.
        ce_excess: cross-entropy under the variant above that under the base.
        ce_excess_error: its standard error.
        kl: KL(base ‖ variant).
        kl_error: its standard error.
    """

    tokens: int
    base_loss: float | None
    ce_excess: float | None
    ce_excess_error: float | None
    kl: float | None
    kl_error: float | None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def slice_tokens(reading: Reading, chosen: np.ndarray, blocks: np.ndarray) -> Slice:
    """The means over some tokens of a reading.

    Args:
        chosen: (N,) bool, which.
        blocks: (N,) the number of each token's block.
    """
    if not chosen.any():
        return Slice(0, *[None] * 5)
    excess, excess_error = _mean(reading.loss - reading.base_loss, chosen, blocks)
    kl, kl_error = _mean(reading.kl, chosen, blocks)
    base_loss = float(reading.base_loss[chosen].mean(dtype=np.float64))
    return Slice(int(chosen.sum()), base_loss, excess, excess_error, kl, kl_error)


def _mean(values: np.ndarray, chosen: np.ndarray, blocks: np.ndarray) -> tuple[float, float | None]:
    """The mean of chosen ones among values (N,), and its standard error over blocks."""
    count = int(blocks[-1]) + 1
    sums = np.bincount(blocks[chosen], values[chosen], count)
    sizes = np.bincount(blocks[chosen], minlength=count)
    mean = sums.sum() / sizes.sum()
    if count == 1:
        return float(mean), None
    spread = np.square(sums - mean * sizes).sum() * count / (count - 1)
    return float(mean), float(np.sqrt(spread) / sizes.sum())


def slice_by(reading: Reading, choices: Mapping[str, np.ndarray], blocks: np.ndarray) -> dict[str, Slice]:
    """`slice_tokens` for each of several choices, by name."""
    return {name: slice_tokens(reading, chosen, blocks) for name, chosen in choices.items()}


def by_recall(distances: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """Which tokens are hits, at which distance, and which are none.

    Args:
        distances: (N,) of the predicted tokens; see `hits.hit_distances`.
        context: hits farther back than 1,024 tokens have a slice of their own, beside being among those farther back
            than 256, where it allows any.
    """
    choices = {
        "all": distances >= 0,
        "other": distances == 0,
        "hits": distances > 0,
        f"hits, 1 to {NEAR} back": (distances > 0) & (distances <= NEAR),
        f"hits, {NEAR + 1} to {MIDDLE} back": (distances > NEAR) & (distances <= MIDDLE),
        f"hits, over {MIDDLE} back": distances > MIDDLE,
    }
    if context > FAR + 2:
        choices[f"hits, over {FAR:,} back"] = distances > FAR
    return choices


def by_position(positions: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """Which tokens lie at positions 0 to 127 of their blocks, 128 to 255, 256 to 511, and so on, doubling.

    Args:
        positions: (N,) of the predicted tokens; a block's first, at 0, is not predicted.
    """
    choices = {}
    start, end = 0, FIRST_BUCKET
    while start < context:
        choices[f"{start:,} to {min(end, context) - 1:,}"] = (positions >= start) & (positions < end)
        start, end = end, 2 * end
    return choices
