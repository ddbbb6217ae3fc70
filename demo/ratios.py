"""How two things compare whose times are noisy: ratios with intervals, a fit that only falls, and what can be said."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

CONFIDENCE = 0.9
Length = Annotated[int, Field(ge=1, le=10**7)]
Positive = Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]


class Ratio(NamedTuple):
    """Ours over theirs at one length: the median over rounds in which both were timed, and an interval for it.

    The bounds are checked where one is read, see `measured.unpacked`.
    """

    length: Length
    middle: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True)
class BreakEven:
    """From which length on ours is no slower, as far as the intervals tell.

    Attributes:
        length: where the fitted ratio crosses 1; None if it does not, the shortest length if it is never above.
        slower_to: the longest length at which ours is surely slower; None where there is none.
        faster_from: the shortest length from which on ours is surely faster; None where there is none.
    """

    length: float | None
    slower_to: int | None
    faster_from: int | None

    @property
    def is_known(self) -> bool:
        """Whether the noise leaves anything to say."""
        return self.slower_to is not None or self.faster_from is not None


def ratio(length: int, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of times taken in the same rounds."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = interval(len(ratios))
    return Ratio(length, statistics.median(ratios), ratios[low], ratios[high])


def interval(count: int) -> tuple[int, int]:
    """Places of the sorted values between which the median lies with at least `CONFIDENCE`; all, if they are few.

    Order statistics: the number of values below the median is binomial with ½ (David & Nagaraja 2003, section 7.1).
    """
    place, below = 0, 0.0
    while place < (count - 1) // 2:
        below += math.comb(count, place) / 2**count
        if 2 * (below + math.comb(count, place + 1) / 2**count) > 1 - CONFIDENCE:
            break
        place += 1
    return place, count - 1 - place


def falling(values: Sequence[float]) -> list[float]:
    """The nearest values (least squares) that never rise: pools neighbours that do (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [value for value, count in pools for _ in range(count)]


def break_even(ratios: Sequence[Ratio]) -> BreakEven:
    """Where ours becomes as fast as theirs, under the assumption that the ratio never rises with the length."""
    lengths = [each.length for each in ratios]
    middle, low, high = (
        falling([math.log(getattr(each, name)) for each in ratios]) for name in ("middle", "low", "high")
    )
    slower = [length for length, value in zip(lengths, low, strict=True) if value > 0]
    faster = [length for length, value in zip(lengths, high, strict=True) if value < 0]
    return BreakEven(crossing(lengths, middle), max(slower, default=None), min(faster, default=None))


def crossing(lengths: Sequence[int], logs: Sequence[float]) -> float | None:
    """Where falling logs of ratios reach 0, read off straight lines in the log-log plot; None where they do not."""
    for index, value in enumerate(logs):
        if value <= 0:
            if index == 0:
                return float(lengths[0])
            share = logs[index - 1] / (logs[index - 1] - value)
            return lengths[index - 1] * (lengths[index] / lengths[index - 1]) ** share
    return None


def round_length(length: float) -> int:
    """Two significant digits: a crossing is known no better."""
    digits = 10 ** max(int(math.log10(length)) - 1, 0)
    return round(length / digits) * digits


def verdict(ratios: Sequence[Ratio], base: str) -> str:
    """In words where ours is slower and where it is faster, and where the times are too noisy to tell."""
    even, first, last = break_even(ratios), ratios[0], ratios[-1]
    if not even.is_known:
        return f"too noisy to tell from {base} up to {last.length:,} tokens: their times overlap at every length."
    parts = []
    if even.slower_to is not None:
        parts.append(
            f"slower than {base} up to {even.slower_to:,} tokens ({_times(first)} as long at {first.length:,})"
        )
    if even.faster_from is None:
        rest = "" if even.slower_to == last.length else "; too noisy to tell from there on"
        at_last = f"; at {last.length:,} it takes {_times(last)} as long" if even.slower_to == last.length else ""
        return parts[0] + at_last + rest + "."
    if even.slower_to is None and even.faster_from > first.length:
        parts.append(f"too noisy to tell from {base} below {even.faster_from:,} tokens")
    where = f"from {even.faster_from:,} on" if parts else f"than {base} at every length measured"
    parts.append(f"faster {where} ({_times(last, inverse=True)} as fast at {last.length:,})")
    about = f"; equal at about {round_length(even.length):,}" if even.slower_to is not None and even.length else ""
    return ", ".join(parts) + about + "."


def _times(ratio: Ratio, inverse: bool = False) -> str:
    """A ratio with its interval: "2.1 times (1.9 to 2.4)"."""
    low, middle, high = (ratio.low, ratio.middle, ratio.high)
    if inverse:
        low, middle, high = 1 / high, 1 / middle, 1 / low
    return f"{_number(middle)} times ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
