"""What attention takes on this machine, by the length of the text.

Rounds go through all models in turn, each round from another one on, and a model is compared with its base round by
round: what slows the machine for a while slows both.
"""

from __future__ import annotations

import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from attention import Mechanism, UnsupportedModelError
from attention.state import State
from attention.variant import cache_name

from .busy import BUSY, COMPUTING
from .engine import cache_bytes, new_cache
from .measured import TIMES, Compared, Comparison, Level, Measured, Quantity, Sample, comparisons, rounded
from .mechanisms import as_variant
from .memory import PeakMemory
from .models import LoadedModel
from .ratios import Ratio, interval, ratio
from .timing import here_and_now, seconds_of

SHORTEST = 64
LONGEST = 8192
STEPS = 8  # tokens that are timed after a text
MIN_ROUNDS, MAX_ROUNDS = 5, 15
ROUND_SECONDS = 0.8  # time for the rounds of one length, once there are enough
QUIET_SECONDS = 0.5  # so long nothing else must have been computed before a round


class SpeedError(ValueError):
    """A measurement that cannot be made; the message is for the person who asked for it."""


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

    @property
    def method(self) -> str:
        return ", ".join(dict.fromkeys(mechanism.config.method for mechanism in self.mechanisms))


class AttentionSubject(Subject):
    """The mechanisms of some layers, one after another, on random queries, keys and values of their heads' size."""

    states: list[State]

    def __init__(self, loaded: LoadedModel, layers: Sequence[int] | None = None):
        mechanisms = mechanisms_of(loaded)
        chosen = range(len(mechanisms)) if layers is None else layers
        if any(not 0 <= layer < len(mechanisms) for layer in chosen):
            raise SpeedError(f"{loaded.name} has layers 0 to {len(mechanisms) - 1}.")
        super().__init__(loaded, [mechanisms[layer] for layer in chosen], LONGEST)

    def load(self, length: int) -> None:
        shape, device = self.mechanisms[0].layer, self.loaded.model.device
        generator = torch.Generator().manual_seed(length)
        sizes = [(shape.num_heads, shape.head_dim), *[(shape.num_kv_heads, shape.head_dim)] * 2]
        total = length + STEPS
        self.inputs = [torch.randn(1, h, total, d, generator=generator).to(device) for h, d in sizes]
        self.x = torch.randn(1, total, shape.hidden_size, generator=generator).to(device)
        vocabulary = self.loaded.model.config.vocab_size
        self.tokens = torch.randint(vocabulary, (1, total), generator=generator).to(device)
        self.length = length

    def prefill(self) -> None:
        self.states = [mechanism.new_state() for mechanism in self.mechanisms]
        self._run(0, self.length)

    def step(self) -> None:
        self._run(self.states[0].seen, self.states[0].seen + 1)

    def _run(self, start: int, stop: int) -> None:
        q, k, v = (tensor[:, :, start:stop] for tensor in self.inputs)
        x, tokens = self.x[:, start:stop], self.tokens[:, start:stop]
        for mechanism, state in zip(self.mechanisms, self.states, strict=True):
            mechanism(q, k, v, x, state, None, tokens)

    def state_bytes(self) -> int:
        return sum(state.nbytes() for state in self.states)


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
        cache = {cache_name(type(self.loaded.model)): self.cache}
        self.loaded.model(input_ids, **cache, use_cache=True, logits_to_keep=1)

    def state_bytes(self) -> int:
        return cache_bytes(self.cache)


def mechanisms_of(loaded: LoadedModel) -> list[Mechanism]:
    """The mechanism of each layer; a base's are softmax attention.

    Raises:
        SpeedError: if the model is of a family whose attention cannot be taken apart.
    """
    try:
        return list(as_variant(loaded).mechanisms)
    except UnsupportedModelError as error:
        raise SpeedError(f"{loaded.name} cannot be measured: {error}.") from error


def with_bases(loaded: Sequence[LoadedModel]) -> list[LoadedModel]:
    """Models and the bases that they are compared with, each once, bases first."""
    return list(dict.fromkeys([*(each.base for each in loaded if each.base is not None), *loaded]))


def lengths_up_to(longest: int) -> list[int]:
    """Powers of two from `SHORTEST`, and `longest` itself."""
    powers = [SHORTEST << k for k in range(32) if SHORTEST << k < longest]
    return [*powers, longest] if longest >= SHORTEST else [longest]


@dataclass
class SpeedRun:
    """A measurement of several models; `measure` goes on from length to length, and can be left at any point.

    Args:
        layers: with level "attention", the layers that are measured; None: all.

    Attributes:
        subjects: what is measured; those of bases are what the others are compared with.
        samples: what is known so far.
        ratios: of every variant to its base, by its name and what is compared.
        share: how much of the work is done.
        doing: what is being done, in words.
        ended: set once `measure` does no more.
    """

    loaded: Sequence[LoadedModel]
    level: Level
    longest: int
    seconds: float
    layers: Sequence[int] | None = None
    samples: list[Sample] = field(default_factory=list)
    ratios: dict[tuple[str, Quantity], list[Ratio]] = field(default_factory=dict)
    share: float = 0.0
    doing: str = "Loading"
    finished: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        make = ModelSubject if self.level == "model" else lambda each: AttentionSubject(each, self.layers)
        self.subjects: list[Subject] = [make(each) for each in with_bases(self.loaded)]
        self._stopped = False
        self._waited = 0.0
        self.lengths = lengths_up_to(min(self.longest, max(subject.longest for subject in self.subjects)))

    def stop(self) -> None:
        """Lets `measure` end after the pass that it is at."""
        self._stopped = True

    @property
    def measured(self) -> Measured:
        """What is known so far."""
        return Measured(
            level=self.level,
            layers=None if self.layers is None else tuple(self.layers),
            models=tuple(Compared.of(subject.loaded) for subject in self.subjects),
            lengths=tuple(self.lengths),
            asked=self.longest,
            finished=self.finished,
            short=self._short(),
            where=here_and_now(),
            samples=tuple(self.samples),
            comparisons=tuple(
                Comparison(name, quantity, tuple(found)) for (name, quantity), found in self.ratios.items()
            ),
        )

    def _short(self) -> str:
        """Why the text that was asked for was not reached; empty if it was."""
        reached = max((sample.length for sample in self.samples), default=0)
        if not self.ended.is_set() or reached >= self.longest:
            return ""
        if self.finished:
            return "the models hold no more"
        return "it was stopped" if self._stopped else f"{self.seconds:.0f} s are the limit for one measurement"

    @torch.inference_mode()
    def measure(self) -> Iterator[SpeedRun]:
        """Yields itself after every pass; the models take turns, so that a machine that is busy treats them alike."""
        start = time.monotonic()
        try:
            for share, length in self._passes():
                self.share, self.doing = share, f"Measuring {length:,} tokens"
                yield self
                while self._must_wait():
                    self.doing = "Waiting: something else is being computed here, which would slow both"
                    yield self
                    time.sleep(0.1)
                    self._waited += 0.1
                    if self._stopped:
                        break
                if self._stopped:
                    self.doing = "Stopped; what was measured stays."
                    return
                if time.monotonic() - start - self._waited > self.seconds:
                    self.doing = f"Ended after {self.seconds:.0f} s, the limit for one measurement."
                    return
            self.share, self.doing, self.finished = 1.0, "Done", True
            yield self
        finally:
            self.ended.set()

    @staticmethod
    def _must_wait() -> bool:
        return BUSY.quiet_since(COMPUTING) > time.monotonic() - QUIET_SECONDS

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
        times: dict[tuple[Subject, str], list[float]] = {(each, name): [] for each in subjects for name in TIMES}
        start, done = time.monotonic(), 0
        while done < MIN_ROUNDS or (done < MAX_ROUNDS and time.monotonic() - start < ROUND_SECONDS):
            begun = time.monotonic()
            found = {}
            for number, subject in enumerate(subjects[done % len(subjects) :] + subjects[: done % len(subjects)]):
                with subject.loaded.lock:
                    found[subject, "prefill_ms"] = 1e3 * seconds_of(subject.prefill)
                    subject.step()  # the first one may have to grow the state
                    tokens = [seconds_of(subject.step) for _ in range(STEPS - 1)]
                found[subject, "token_ms"] = 1e3 * statistics.median(tokens)
                yield min(0.4 + 0.6 * (done + (number + 1) / len(subjects)) / MIN_ROUNDS, 1.0)
            if BUSY.quiet_since(COMPUTING) > begun:  # something was computed meanwhile: this round says little
                continue
            done += 1
            for key, value in found.items():
                times[key].append(value)
        self._keep(subjects, length, times, peaks, sizes)

    def _keep(
        self,
        subjects: list[Subject],
        length: int,
        times: dict[tuple[Subject, str], list[float]],
        peaks: dict[Subject, int],
        sizes: dict[Subject, int],
    ) -> None:
        """Makes samples and ratios of the times of one length."""
        by_name = {subject.loaded.name: subject for subject in subjects}
        for subject in subjects:
            prefill, token = (times[subject, name] for name in TIMES)
            self.samples.append(
                Sample(
                    model=subject.loaded.name,
                    method=subject.method,
                    length=length,
                    prefill_ms=rounded(statistics.median(prefill)),
                    token_ms=rounded(statistics.median(token)),
                    prefill_spread=_spread(prefill),
                    token_spread=_spread(token),
                    peak_bytes=peaks[subject],
                    state_bytes=sizes[subject],
                )
            )
        for name, base in comparisons([Compared.of(subject.loaded) for subject in self.subjects]):
            if name in by_name and base in by_name:
                for quantity in TIMES:
                    ours, theirs = times[by_name[name], quantity], times[by_name[base], quantity]
                    self.ratios.setdefault((name, quantity), []).append(_rounded(ratio(length, ours, theirs)))


def _rounded(found: Ratio) -> Ratio:
    return Ratio(found.length, *(rounded(value) for value in (found.middle, found.low, found.high)))


def _spread(values: list[float]) -> tuple[float, float]:
    low, high = interval(len(values))
    ordered = sorted(values)
    return rounded(ordered[low]), rounded(ordered[high])
