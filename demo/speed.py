"""What attention costs on this machine, by the length of the text: measured, and counted.

Times are the shortest of several: other work on the machine only ever adds to them.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import attention
from attention import Mechanism
from attention.state import State

from .components.curves import Axis, Chart, Event, Series
from .engine import cache_bytes, new_cache
from .memory import PeakMemory
from .models import LoadedModel
from .timing import seconds_of

Level = Literal["layer", "model"]
SHORTEST = 64
LONGEST = 8192
STEPS = 8  # tokens that are timed after a text
MIN_ROUNDS, MAX_ROUNDS = 3, 12
ROUND_SECONDS = 0.8  # time for the rounds of one length, once there are enough


class SpeedError(ValueError):
    """A measurement that cannot be made; the message is for the person who asked for it."""


@dataclass(frozen=True)
class Sample:
    """What one model takes for one length.

    Attributes:
        length: tokens of the text.
        prefill_ms: shortest time of one pass over it, in milliseconds.
        token_ms: shortest time of one more token after it, in milliseconds.
        peak_bytes: the most that was allocated at once during the pass, state included.
        state_bytes: bytes of the decode state after it.
        operations: floating-point operations of attention in the pass; a multiply-add is two.
        keys_read: keys (or rows of the state) that its last token reads in a layer.
    """

    model: str
    method: str
    length: int
    prefill_ms: float
    token_ms: float
    peak_bytes: int
    state_bytes: int
    operations: int
    keys_read: float


class Subject(ABC):
    """Something whose time is measured: `load` a text, `prefill` it, then `step` over tokens after it."""

    def __init__(self, loaded: LoadedModel, mechanisms: Sequence[Mechanism], longest: int):
        self.loaded = loaded
        self.mechanisms = mechanisms
        self.longest = longest

    @abstractmethod
    def load(self, length: int) -> None:
        """Makes the inputs."""

    @abstractmethod
    def prefill(self) -> None:
        """One pass over the text, into a new state."""

    @abstractmethod
    def step(self) -> None:
        """One token after what the state has seen."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the state."""

    def operations(self, length: int) -> int:
        return sum(mechanism.operations(length) for mechanism in self.mechanisms)

    def keys_read(self, length: int) -> float:
        return statistics.mean(mechanism.keys_read(length - 1) for mechanism in self.mechanisms)


class LayerSubject(Subject):
    """The mechanism of a model's first layer, alone, on random queries, keys and values of its heads' size."""

    state: State

    def __init__(self, loaded: LoadedModel):
        self.mechanism = mechanisms_of(loaded)[0]
        super().__init__(loaded, [self.mechanism], LONGEST)

    def load(self, length: int) -> None:
        shape, device = self.mechanism.layer, self.loaded.model.device
        generator = torch.Generator().manual_seed(length)
        sizes = [(shape.num_heads, shape.head_dim), *[(shape.num_kv_heads, shape.head_dim)] * 2]
        total = length + STEPS
        self.inputs = [torch.randn(1, h, total, d, generator=generator).to(device) for h, d in sizes]
        self.x = torch.randn(1, total, shape.hidden_size, generator=generator).to(device)
        vocabulary = self.loaded.model.config.vocab_size
        self.tokens = torch.randint(vocabulary, (1, total), generator=generator).to(device)
        self.length = length

    def prefill(self) -> None:
        self.state = self.mechanism.new_state()
        self._run(0, self.length)

    def step(self) -> None:
        self._run(self.state.seen, self.state.seen + 1)

    def _run(self, start: int, stop: int) -> Tensor:
        q, k, v = (tensor[:, :, start:stop] for tensor in self.inputs)
        return self.mechanism(q, k, v, self.x[:, start:stop], self.state, None, self.tokens[:, start:stop])

    def state_bytes(self) -> int:
        return self.state.nbytes()


class ModelSubject(Subject):
    """A whole model, on random tokens, as far as its context goes."""

    cache: Cache

    def __init__(self, loaded: LoadedModel):
        super().__init__(loaded, mechanisms_of(loaded), loaded.context - STEPS)

    def load(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        vocabulary = self.loaded.model.config.vocab_size
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        self.input_ids = ids.to(self.loaded.model.device)

    def prefill(self) -> None:
        self.cache = new_cache(self.loaded)
        self._run(self.input_ids)

    def step(self) -> None:
        self._run(self.input_ids[:, :1])

    def _run(self, input_ids: Tensor) -> None:
        self.loaded.model(input_ids, cache=self.cache, use_cache=True, logits_to_keep=1)

    def state_bytes(self) -> int:
        return cache_bytes(self.cache)


def mechanisms_of(loaded: LoadedModel) -> list[Mechanism]:
    """The mechanism of each layer; a base's are softmax attention.

    Raises:
        SpeedError: if the model is of a family whose attention cannot be taken apart.
    """
    model = loaded.model
    if not attention.is_variant(model):
        try:
            model = attention.convert(model, attention.SoftmaxConfig(), share=True)
        except attention.UnsupportedModelError as error:
            raise SpeedError(f"{loaded.name} cannot be measured: {error}.") from error
    return model.eval().mechanisms


def lengths_up_to(longest: int) -> list[int]:
    """Powers of two from `SHORTEST`, and `longest` itself."""
    powers = [SHORTEST << k for k in range(32) if SHORTEST << k < longest]
    return [*powers, longest] if longest >= SHORTEST else [longest]


@dataclass
class SpeedRun:
    """A measurement of several models; `measure` goes on from length to length, and can be left at any point.

    Attributes:
        subjects: what is measured; those of bases are what the others are compared with.
        samples: what is known so far.
        share: how much of the work is done.
        doing: what is being done, in words.
        ended: set once `measure` does no more.
    """

    loaded: Sequence[LoadedModel]
    level: Level
    longest: int
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    share: float = 0.0
    doing: str = "Loading"
    finished: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        bases = [each.base for each in self.loaded if each.base is not None]
        with_bases = dict.fromkeys([*bases, *self.loaded])
        make = LayerSubject if self.level == "layer" else ModelSubject
        self.subjects: list[Subject] = [make(each) for each in with_bases]
        self._stopped = False
        self.lengths = lengths_up_to(min(self.longest, max(subject.longest for subject in self.subjects)))

    def stop(self) -> None:
        """Lets `measure` end after the pass that it is at."""
        self._stopped = True

    @torch.inference_mode()
    def measure(self) -> Iterator[SpeedRun]:
        """Yields itself after every pass; the models take turns, so that a machine that is busy treats them alike."""
        deadline = time.monotonic() + self.seconds
        try:
            for share, length in self._passes():
                self.share, self.doing = share, f"Measuring {length:,} tokens"
                yield self
                if self._stopped:
                    self.doing = "Stopped; what was measured stays."
                    return
                if time.monotonic() > deadline:
                    self.doing = f"Ended after {self.seconds:.0f} s, the limit for one measurement."
                    return
            self.share, self.doing, self.finished = 1.0, "Done", True
            yield self
        finally:
            self.ended.set()

    def _passes(self) -> Iterator[tuple[float, int]]:
        """Measures length by length; yields the share that is done and the length after every pass."""
        total = sum(self.lengths)
        for index, length in enumerate(self.lengths):
            subjects = [subject for subject in self.subjects if length <= subject.longest]
            before = sum(self.lengths[:index]) / total
            for done in self._length(subjects, length):
                yield before + done * length / total, length

    def _length(self, subjects: list[Subject], length: int) -> Iterator[float]:
        """Measures one length, yielding the share that is done; the samples are added at its end."""
        peaks, sizes = {}, {}
        for number, subject in enumerate(subjects):
            subject.load(length)
            with subject.loaded.lock, PeakMemory() as memory:  # also warms up
                subject.prefill()
            peaks[subject], sizes[subject] = memory.bytes, subject.state_bytes()
            yield 0.4 * (number + 1) / len(subjects)
        prefills: dict[Subject, list[float]] = {subject: [] for subject in subjects}
        tokens: dict[Subject, list[float]] = {subject: [] for subject in subjects}
        start = time.monotonic()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.monotonic() - start > ROUND_SECONDS:
                break
            for number, subject in enumerate(subjects):
                with subject.loaded.lock:
                    prefills[subject].append(seconds_of(subject.prefill))
                    subject.step()  # the first one may have to grow the state
                    tokens[subject] += [seconds_of(subject.step) for _ in range(STEPS - 1)]
                yield min(0.4 + 0.6 * (done + (number + 1) / len(subjects)) / MIN_ROUNDS, 1.0)
        self.samples += [
            Sample(
                model=subject.loaded.name,
                method=subject.loaded.method,
                length=length,
                prefill_ms=1e3 * min(prefills[subject]),
                token_ms=1e3 * min(tokens[subject]),
                peak_bytes=peaks[subject],
                state_bytes=sizes[subject],
                operations=subject.operations(length),
                keys_read=subject.keys_read(length),
            )
            for subject in subjects
        ]

    def of(self, name: str) -> list[Sample]:
        """A model's samples, shortest first."""
        return [sample for sample in self.samples if sample.model == name]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """(variant, its base) for every variant whose base is known."""
        variants = [subject.loaded for subject in self.subjects if not subject.loaded.entry.is_base]
        return [(variant.name, variant.base.name) for variant in variants if variant.base is not None]


def break_even(samples: Sequence[Sample], base: Sequence[Sample], quantity: str) -> float | None:
    """The length from which on a method takes no more of `quantity` than softmax, as far as was measured.

    Between two measured lengths the crossing is read off straight lines in the log-log plot.

    Returns:
        None where softmax takes less at the longest length.
    """
    theirs = {sample.length: getattr(sample, quantity) for sample in base}
    ratios = [
        (sample.length, math.log(getattr(sample, quantity) / theirs[sample.length]))
        for sample in samples
        if theirs.get(sample.length)
    ]
    crossing = None
    for index in range(len(ratios) - 1, -1, -1):
        length, ratio = ratios[index]
        if ratio > 0:
            return None if crossing is None else _crossing(ratios[index], ratios[index + 1])
        crossing = float(length)
    return crossing


def _crossing(before: tuple[int, float], after: tuple[int, float]) -> float:
    share = before[1] / (before[1] - after[1])
    return before[0] * (after[0] / before[0]) ** share


MEASURED = {
    "prefill_ms": ("Time to read a text", "One pass over the whole text (prefill).", "ms", 1.0),
    "token_ms": ("Time for one more token", "After a text of that length.", "ms", 1.0),
    "peak_bytes": ("Memory while reading", "The most allocated at once during the pass.", "MB", 1e-6),
}
COUNTED = {
    "operations": ("Operations", "Floating-point operations of attention in one pass.", "", 1.0),
    "keys_read": ("Keys read", "By the last token in a layer: keys, or rows of the state.", "", 1.0),
    "state_bytes": ("Memory of the text", "The decode state: what is kept for the tokens to come.", "kB", 1e-3),
}


def charts(run: SpeedRun, quantities: dict[str, tuple[str, str, str, float]]) -> list[Chart]:
    """One log-log chart for each quantity; times are marked with their break-even."""
    if not run.samples:
        return []
    ticks = [float(length) for length in run.lengths]
    x: Axis = {"label": "tokens", "log": True, "min": ticks[0], "max": ticks[-1], "ticks": ticks}
    return [
        {
            "title": title,
            "note": note,
            "x": x,
            "y": {"label": unit, "unit": unit, "log": True},
            "series": _series(run, quantity, factor),
            "events": _events(run, quantity) if quantity.endswith("_ms") else [],
        }
        for quantity, (title, note, unit, factor) in quantities.items()
    ]


def _series(run: SpeedRun, quantity: str, factor: float) -> list[Series]:
    colors = _colors(run)
    return [
        {
            "name": name,
            "color": color,
            "dots": True,
            "points": [[sample.length, getattr(sample, quantity) * factor] for sample in run.of(name)],
        }
        for name, color in colors.items()
    ]


def _colors(run: SpeedRun) -> dict[str, int]:
    """A colour for each model: neutral for bases."""
    colors: dict[str, int] = {}
    for subject in run.subjects:
        used = max(colors.values(), default=0)
        colors[subject.loaded.name] = 0 if subject.loaded.entry.is_base else used + 1
    return colors


def _events(run: SpeedRun, quantity: str) -> list[Event]:
    events: list[Event] = []
    for name, base in run.comparisons:
        length = break_even(run.of(name), run.of(base), quantity)
        if length is not None and length > run.lengths[0]:
            label = f"{name} from {round_length(length):,}"
            events.append({"x": length, "label": label, "color": _colors(run)[name]})
    return events


def round_length(length: float) -> int:
    """Two significant digits: a crossing is known no better."""
    digits = 10 ** max(int(math.log10(length)) - 1, 0)
    return round(length / digits) * digits


def verdicts(run: SpeedRun) -> list[str]:
    """For each variant, in words, where it is slower and where it is faster than its base."""
    sentences = []
    for name, base in run.comparisons:
        ours, theirs = run.of(name), {sample.length: sample for sample in run.of(base)}
        ours = [sample for sample in ours if sample.length in theirs]
        if not ours:
            continue
        for quantity, what in (("prefill_ms", "reading a text"), ("token_ms", "one more token")):
            ratios = [getattr(theirs[s.length], quantity) / getattr(s, quantity) for s in ours]
            even = break_even(ours, list(theirs.values()), quantity)
            sentences.append(f"{name}, {what}: " + _verdict([s.length for s in ours], ratios, even, base))
    return sentences


def _verdict(lengths: list[int], ratios: list[float], even: float | None, base: str) -> str:
    first, last = f"at {lengths[0]:,} tokens", f"at {lengths[-1]:,}"
    if even is None:
        return f"slower than {base} up to {lengths[-1]:,} tokens; {last} it takes {_times(1 / ratios[-1])} as long."
    if even <= lengths[0]:
        return (
            f"no slower than {base} at any length measured; {_times(ratios[0])} as fast {first}, "
            f"{_times(ratios[-1])} {last}."
        )
    return (
        f"slower than {base} below about {round_length(even):,} tokens ({_times(1 / ratios[0])} as long {first}), "
        f"no slower from there on; {_times(ratios[-1])} as fast {last}."
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"


def report(run: SpeedRun) -> dict[str, Any]:
    """A run as JSON."""
    return {
        "level": run.level,
        "finished": run.finished,
        "samples": [asdict(sample) for sample in run.samples],
        "break_even": {
            name: {
                quantity: break_even(run.of(name), run.of(base), quantity) for quantity in ("prefill_ms", "token_ms")
            }
            for name, base in run.comparisons
        },
        "verdicts": verdicts(run),
    }
