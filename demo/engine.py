"""Several models continue one prompt side by side, a token each in turn."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache

import attention
from attention.state import State
from attention.variant import cache_name

from .busy import BUSY, COMPUTING
from .compare import mark_parting, score
from .hits import distances
from .memory import PeakMemory
from .models import LoadedModel, LoadError, ModelStore, said
from .runs import Column, Cost, Run, Settings
from .text import PromptError, TokenTexts, encode, room_for_prompt

logger = logging.getLogger(__name__)

FRAME_SECONDS = 0.07  # the page is not sent more often than it can be read


def warpers(settings: Settings) -> LogitsProcessorList:
    """The sampling options as transformers applies them in `generate`, in its order."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k > 0:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(TopPLogitsWarper(settings.top_p))
    return processors


def new_cache(loaded: LoadedModel) -> Cache:
    """An empty cache: the mechanisms' own states, or for a base the one that transformers gives it."""
    if attention.is_variant(loaded.model):
        return loaded.model.new_cache()
    return DynamicCache(config=loaded.model.config)


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds, all layers."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: object) -> int:
    if isinstance(layer, State):
        return layer.nbytes()
    return sum(t.numel() * t.element_size() for t in vars(layer).values() if isinstance(t, Tensor))


def keys_used(loaded: LoadedModel, position: int) -> tuple[int, int]:
    """Keys that a query at `position` reads, and those that it goes through to choose them: means over layers."""
    if not attention.is_variant(loaded.model):
        return position + 1, 0
    read = statistics.mean(mechanism.keys_read(position) for mechanism in loaded.model.mechanisms)
    scored = statistics.mean(mechanism.keys_scored(position) for mechanism in loaded.model.mechanisms)
    return round(read), round(scored)


class Decoder:
    """One model writing one column, a token at each `step`."""

    def __init__(self, loaded: LoadedModel, column: Column, settings: Settings):
        self.loaded = loaded
        self.column = column
        self.settings = settings
        self._processors = warpers(settings)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._texts = TokenTexts(loaded.tokenizer)
        self._cache = new_cache(loaded)
        self._forward_seconds: list[float] = []
        self._step_seconds: list[float] = []
        ends = loaded.model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        prompt = encode(loaded.tokenizer, settings.prompt)
        read = prompt[-room_for_prompt(loaded.context, settings.max_new_tokens) :]
        for token_id in read:
            self._append(token_id)
        column.prompt_length = len(read)
        column.dropped = len(prompt) - len(read)
        column.method = loaded.method
        column.stage = "writing"

    def _append(self, token_id: int) -> None:
        self.column.token_ids.append(token_id)
        self.column.tokens.append(self._texts.next(token_id))

    @torch.inference_mode()
    def step(self) -> None:
        """Appends one token, and says in the column when it was the last."""
        start = time.perf_counter()
        new = self.column.token_ids[self._cache.get_seq_length() :]
        token_id = self._sample(self._forward(new))
        self._append(token_id)
        self._step_seconds.append(time.perf_counter() - start)
        if token_id in self._ends:
            self.column.stopped = "end"
        elif self.column.generated >= self.settings.max_new_tokens:
            self.column.stopped = "length"
        elif len(self.column.token_ids) >= self.loaded.context:
            self.column.stopped = "context"

    def _forward(self, token_ids: list[int]) -> Tensor:
        """Logits (1, V) after `token_ids`, which follow what the cache has seen."""
        model = self.loaded.model
        input_ids = torch.tensor([token_ids], device=model.device)
        with self.loaded.lock:
            start = time.perf_counter()
            cache = {cache_name(type(model)): self._cache}
            logits = model(input_ids, **cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            logits = logits.float().cpu()  # waits for a device, so that the time is right
            self._forward_seconds.append(time.perf_counter() - start)
        if not logits.isfinite().all():
            raise ArithmeticError("what it predicts is not finite; its weights are broken")
        return logits

    def _sample(self, logits: Tensor) -> int:
        logits = self._processors(torch.tensor([self.column.token_ids]), logits)
        if self.settings.temperature == 0.0:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))

    def cost(self) -> Cost:
        """What it took so far, at least one step; measures memory by a second, untimed pass over the prompt."""
        later_forward, later_steps = self._forward_seconds[1:], self._step_seconds[1:]
        state_bytes = cache_bytes(self._cache)
        read, scored = keys_used(self.loaded, len(self.column.token_ids) - 2)
        weights = {t.data_ptr(): t.numel() * t.element_size() for t in self.loaded.model.state_dict().values()}
        return Cost(
            prefill_ms=1e3 * self._forward_seconds[0],
            ms_per_token=1e3 * statistics.median(later_forward) if later_forward else None,
            tokens_per_second=len(later_steps) / sum(later_steps) if later_steps else None,
            state_bytes=state_bytes,
            peak_bytes=sum(weights.values()) + max(state_bytes, self._prefill_bytes()),
            keys_read=read,
            keys_scored=scored,
        )

    @torch.inference_mode()
    def _prefill_bytes(self) -> int:
        model = self.loaded.model
        input_ids = torch.tensor([self.column.token_ids[: self.column.prompt_length]], device=model.device)
        with self.loaded.lock, PeakMemory() as memory:
            model(input_ids, **{cache_name(type(model)): new_cache(self.loaded)}, use_cache=True, logits_to_keep=1)
        return memory.bytes


class Generation:
    """All of a run's models, one token each in turn; the same settings give the same text.

    A model that fails says so in its own column, and the others go on. When the app closes, all runs end.

    Attributes:
        run: what there is so far; it grows.
    """

    def __init__(self, store: ModelStore, settings: Settings):
        self.store = store
        self.run = Run(settings, [Column(name) for name in settings.models])
        self._decoders: list[Decoder] = []
        self._deadline = time.monotonic() + store.limits.seconds
        self._lock = threading.Lock()
        self._stopping = False  # said without the lock, which the next step could take first
        self._finished = False

    def stream(self) -> Iterator[Run]:
        """Yields the same run as models load, after every token, and at the end with costs and scores."""
        for column in self.run.columns:
            with self._lock:
                if self._finished:
                    break
                column.stage = "loading"
            yield self.run
            self._start(column)
        while active := [decoder for decoder in self._decoders if decoder.column.stage == "writing"]:
            for decoder in active:
                if self.store.closing.is_set():
                    return
                self._step(decoder)
                yield self.run
        yield self.finish()

    def finish(self) -> Run:
        """Ends what still runs, then fills in costs and scores; safe to call while another thread streams."""
        self._stopping = True
        with self._lock:
            if not self._finished:
                self._finished = True
                for column in self.run.columns:
                    if column.stage != "failed":
                        column.stopped = column.stopped or "stopped"
                        column.stage = "done"
                self._compare()
        return self.run

    def _start(self, column: Column) -> None:
        try:
            if time.monotonic() > self._deadline and column.name not in self.store.loaded():
                raise LoadError("The time limit was reached before it was loaded.")
            loaded = self.store.get(column.name)
            with self._lock:
                if not self._finished:
                    self._decoders.append(Decoder(loaded, column, self.run.settings))
        except (LoadError, PromptError) as error:
            self._fail(column, str(error))
        except Exception as error:
            logger.exception("%s failed before it wrote", column.name)
            self._fail(column, f"The model failed: {said(error)}")

    def _step(self, decoder: Decoder) -> None:
        column = decoder.column
        with self._lock:
            if self._stopping:
                return
            try:
                with BUSY.doing(COMPUTING):
                    decoder.step()
            except Exception as error:
                logger.exception("%s failed while writing", column.name)
                self._fail(column, f"The model failed: {said(error)}")
                return
            if column.stopped is None and time.monotonic() > self._deadline:
                column.stopped = "time"
            if column.stopped is not None:
                column.stage = "done"

    def _compare(self) -> None:
        for decoder in self._decoders:
            column = decoder.column
            if column.stage != "done" or column.generated == 0:
                continue
            try:
                with BUSY.doing(COMPUTING):
                    self._compare_one(decoder, column)
            except Exception as error:  # of memory, most likely: the text is worth showing without
                logger.exception("%s could not be compared with its base", column.name)
                column.problem = f"It could not be compared with its base: {said(error)}"
        mark_parting(self.run)

    @staticmethod
    def _compare_one(decoder: Decoder, column: Column) -> None:
        column.cost = decoder.cost()
        column.scores = score(decoder.loaded, column)
        if decoder.loaded.base is not None:
            column.hits = distances(decoder.loaded.base, column.token_ids)[column.prompt_length :]

    @staticmethod
    def _fail(column: Column, problem: str) -> None:
        column.problem, column.stage = problem, "failed"


class RemoteGeneration(Generation):
    """A generation in another process, of which this one sees copies; see `gpu`.

    Args:
        write: streams the runs of a generation with the given settings.
    """

    def __init__(self, store: ModelStore, settings: Settings, write: Callable[[Settings], Iterator[Run]]):
        super().__init__(store, settings)
        self._write = write

    def stream(self) -> Iterator[Run]:
        for run in self._write(self.run.settings):
            with self._lock:
                if self._finished:
                    return
                self.run = run
            yield run


def frames(generation: Generation) -> Iterator[Run]:
    """A generation's states, not more often than every `FRAME_SECONDS`, and always the last."""
    shown = 0.0
    run = None
    for run in generation.stream():
        if time.monotonic() - shown >= FRAME_SECONDS:
            yield run
            shown = time.monotonic()
    if run is not None:
        yield run
