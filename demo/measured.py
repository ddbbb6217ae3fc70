"""What a measurement found: its charts, its words, and the form in which a page's address keeps it.

It is made of named tuples, for as JSON these are lists without names: an address is short.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from .components.curves import Axis, Chart, Event, Series
from .models import LoadedModel
from .ratios import BreakEven, Length, Positive, Ratio, break_even, round_length, verdict

Level = Literal["attention", "model"]
Quantity = Literal["prefill_ms", "token_ms"]
Name = Annotated[str, Field(max_length=300)]
Bytes = Annotated[int, Field(ge=0, le=10**15)]

TIMES: tuple[Quantity, Quantity] = ("prefill_ms", "token_ms")
WHAT = {"prefill_ms": "reading a text", "token_ms": "one more token"}
DIGITS = 3  # a measurement is known no better, and the page's address keeps every digit
PACKED = 8_000  # characters; no address is longer
UNPACKED = 300_000  # bytes


class Compared(NamedTuple):
    """A model by its name, and what it is compared with.

    Attributes:
        is_base: whether it is a plain model.
        base: the model that it was made from; None for a plain one, and where that is not known.
    """

    name: Name
    is_base: bool
    base: Name | None = None

    @classmethod
    def of(cls, loaded: LoadedModel) -> Compared:
        base = None if loaded.entry.is_base or loaded.base is None else loaded.base.name
        return cls(loaded.name, loaded.entry.is_base, base)


class Sample(NamedTuple):
    """What one model takes for one length.

    Attributes:
        method: the method, or the methods of its layers.
        length: tokens of the text.
        prefill_ms: median time of one pass over it, in milliseconds.
        token_ms: median time of one more token after it, in milliseconds.
        prefill_spread, token_spread: between these the median lies with 90 %, in milliseconds.
        peak_bytes: the most that was allocated at once during the pass, state included.
        state_bytes: bytes of the decode state after it.
    """

    model: Name
    method: Name
    length: Length
    prefill_ms: Positive
    token_ms: Positive
    prefill_spread: tuple[Positive, Positive]
    token_spread: tuple[Positive, Positive]
    peak_bytes: Bytes
    state_bytes: Bytes


class Comparison(NamedTuple):
    """The times of a variant over its base's, shortest text first."""

    model: Name
    quantity: Quantity
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=40)]


class Measured(NamedTuple):
    """A measurement of several models, done or under way.

    Attributes:
        layers: with level "attention", the layers that were measured; None: all.
        models: all that were measured, bases first.
        lengths: of the texts that were to be measured, shortest first.
        asked: the longest text that was asked for.
        finished: whether every length that the models hold was measured.
        short: why that was not reached; empty if it was, or still may be.
        where: on which machine and on which day.
        samples: what was found.
        comparisons: of every variant with its base.
    """

    level: Level
    layers: Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(max_length=1000)] | None
    models: Annotated[tuple[Compared, ...], Field(max_length=50)]
    lengths: Annotated[tuple[Length, ...], Field(min_length=1, max_length=40)]
    asked: Length
    finished: bool
    short: Annotated[str, Field(max_length=200)]
    where: Annotated[str, Field(max_length=300)]
    samples: Annotated[tuple[Sample, ...], Field(max_length=2000)]
    comparisons: Annotated[tuple[Comparison, ...], Field(max_length=200)]

    @property
    def reached(self) -> int:
        """The longest text that was measured; 0 if none was."""
        return max((sample.length for sample in self.samples), default=0)

    @property
    def falls_short(self) -> str:
        """That the text that was asked for was not reached, and why; empty if it was."""
        if not self.short:
            return ""
        return f"{self.asked:,} tokens were asked for, {self.reached:,} reached: {self.short}. Counted, below, goes on."

    def of(self, name: str) -> list[Sample]:
        """A model's samples, shortest first."""
        return [sample for sample in self.samples if sample.model == name]

    def ratios(self, name: str, quantity: str) -> list[Ratio]:
        """A variant's times over its base's, shortest text first."""
        found = (each for each in self.comparisons if (each.model, each.quantity) == (name, quantity))
        return next((list(each.ratios) for each in found), [])

    def break_even(self, name: str, quantity: str) -> BreakEven | None:
        """Where a variant becomes as fast as its base; None while nothing is known."""
        ratios = self.ratios(name, quantity)
        return break_even(ratios) if ratios else None


_MEASURED = TypeAdapter(Measured)


def rounded(value: float) -> float:
    """`DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def packed(found: Measured) -> str:
    """A measurement as one word for the page's address; empty where it is too long for that."""
    word = base64.urlsafe_b64encode(zlib.compress(_MEASURED.dump_json(found), 9)).decode().rstrip("=")
    return word if len(word) <= PACKED else ""


def unpacked(word: str) -> Measured:
    """The measurement that `packed` made a word of.

    Raises:
        ValueError: if it is none, whoever wrote it.
    """
    try:
        data = zlib.decompressobj().decompress(base64.urlsafe_b64decode(word[:PACKED] + "=="), UNPACKED)
        return _MEASURED.validate_json(data)
    except (ValueError, zlib.error) as error:  # no base64, no JSON, or not these data
        raise ValueError("The results in the link cannot be read; Measure takes them anew.") from error


def comparisons(models: Sequence[Compared]) -> list[tuple[str, str]]:
    """(variant, its base) for every variant whose base is known."""
    return [(each.name, each.base) for each in models if each.base is not None]


def colours(models: Sequence[Compared]) -> dict[str, int]:
    """A colour for each model: neutral for bases."""
    found: dict[str, int] = {}
    for each in models:
        found[each.name] = 0 if each.is_base else max(found.values(), default=0) + 1
    return found


CHARTS = {
    "prefill_ms": ("Time to read a text", "One pass over the whole text (prefill).", "ms", 1.0),
    "token_ms": ("Time for one more token", "After a text of that length.", "ms", 1.0),
    "peak_bytes": ("Memory while reading", "The most allocated at once during the pass.", "MB", 1e-6),
}


def length_axis(lengths: Sequence[int]) -> Axis:
    """Lengths of texts, logarithmic."""
    ticks = [float(length) for length in lengths]
    return {"label": "tokens", "log": True, "min": ticks[0], "max": ticks[-1], "ticks": ticks}


def charts(found: Measured) -> list[Chart]:
    """One log-log chart for each quantity; times have bars for their spread and are marked with their break-even."""
    if not found.samples:
        return []
    return [
        {
            "title": title,
            "note": note,
            "x": length_axis(found.lengths),
            "y": {"label": unit, "unit": unit, "log": True},
            "series": _series(found, quantity, factor),
            "events": _events(found, quantity) if quantity in TIMES else [],
        }
        for quantity, (title, note, unit, factor) in CHARTS.items()
    ]


def _series(found: Measured, quantity: str, factor: float) -> list[Series]:
    series: list[Series] = []
    for name, color in colours(found.models).items():
        samples = found.of(name)
        points = [[sample.length, getattr(sample, quantity) * factor] for sample in samples]
        series.append({"name": name, "color": color, "dots": True, "points": points})
        if quantity in TIMES:
            spreads = [getattr(sample, quantity.replace("_ms", "_spread")) for sample in samples]
            series[-1]["spread"] = [[sample.length, *spread] for sample, spread in zip(samples, spreads, strict=True)]
    return series


def _events(found: Measured, quantity: str) -> list[Event]:
    events: list[Event] = []
    by_name = colours(found.models)
    for name, _ in comparisons(found.models):
        even = found.break_even(name, quantity)
        if even and even.is_known and even.length is not None and even.length > found.lengths[0]:
            label = f"{name} from {round_length(even.length):,}"
            events.append({"x": even.length, "label": label, "color": by_name[name]})
    return events


def verdicts(found: Measured) -> list[str]:
    """For each variant, in words, where it is slower and where faster than its base, as far as noise lets tell."""
    sentences = [
        f"{name}, {WHAT[quantity]}: {verdict(ratios, base)}"
        for name, base in comparisons(found.models)
        for quantity in TIMES
        if (ratios := found.ratios(name, quantity))
    ]
    return [*sentences, found.falls_short] if found.falls_short else sentences


def report(found: Measured) -> dict[str, Any]:
    """A measurement as JSON."""
    return {
        "level": found.level,
        "layers": None if found.layers is None else list(found.layers),
        "finished": found.finished,
        "asked": found.asked,
        "reached": found.reached,
        "where": found.where,
        "samples": [sample._asdict() for sample in found.samples],
        "ratios": [
            {"model": each.model, "quantity": each.quantity, **one._asdict()}
            for each in found.comparisons
            for one in each.ratios
        ],
        "break_even": {
            name: {quantity: _even(found.break_even(name, quantity)) for quantity in TIMES}
            for name, _ in comparisons(found.models)
        },
        "verdicts": verdicts(found),
    }


def _even(even: BreakEven | None) -> dict[str, Any] | None:
    if even is None:
        return None
    length = even.length if even.is_known else None
    return {**asdict(even), "length": None if length is None or not math.isfinite(length) else length}
