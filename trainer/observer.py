"""What is recorded of a run while it goes on: losses, validation, samples."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import StageConfig
from .fidelity import Fidelity, measure
from .history import History, Row
from .means import text_means
from .samples import write_texts
from .setup import Setup

logger = logging.getLogger(__name__)


class Observer:
    """Keeps the history of a run, and its best weights. Only the main process writes.

    Attributes:
        history: what happened so far.
        tokens: tokens trained on so far.
        best: with `eval.keep: best`, the best validation figure so far (KL, in pretraining perplexity), and the
            weights that gave it.
        durations: seconds that the last of each took: "eval", "samples".
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.config = setup.config
        self.history = History(None)
        self.tokens = 0
        self.best: tuple[float, dict[str, Tensor]] = (math.inf, {})
        self.durations: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}  # sum and number of steps since the last row, by name
        self._since = (time.monotonic(), 0)  # time and tokens of that row
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        self._base_texts: list[str] | None = None

    @property
    def seconds(self) -> float:
        """Seconds that the run took so far, those before it was resumed included."""
        return round(self._earlier_seconds + time.monotonic() - self._started, 2)

    def open(self, path: Path | None, state: dict[str, Any] | None = None) -> None:
        """Starts the history's file, from what `state` gave when the run is resumed."""
        state = state or {}
        self.history = History(path, state.get("history"))
        self.tokens = state.get("tokens", 0)
        self._sums = state.get("sums", {})
        self._earlier_seconds = state.get("seconds", 0.0)
        self._since = (time.monotonic(), self.tokens)

    def state(self) -> dict[str, Any]:
        """Plain data from which `open` goes on."""
        return {"history": self.history.rows, "tokens": self.tokens, "sums": self._sums, "seconds": self.seconds}

    def count(self, values: dict[str, float], tokens: int) -> None:
        """Takes note of one step: its means over tokens, and how many tokens it trained on."""
        for name, value in values.items():  # counted by name: a run that goes on may have other terms
            total, steps = self._sums.get(name, (0.0, 0))
            self._sums[name] = [total + value, steps + 1]
        self.tokens += tokens

    def record_changes(self, step: int, stage: StageConfig, changes: list[str]) -> None:
        """Adds a row of kind "change": what is other than before from here on."""
        self._add({"kind": "change", "step": step, "stage": stage.stage, "changes": changes})

    def record_losses(self, step: int, stage: StageConfig, optimizers: Sequence[Optimizer]) -> Row:
        """Adds a row of kind "train"."""
        since, tokens = self._since
        row = {
            "kind": "train",
            "step": step,
            "stage": stage.stage,
            **{name: total / steps for name, (total, steps) in self._sums.items()},
            **{group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups},
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": (self.tokens - tokens) / (time.monotonic() - since),
            "peak_memory_mb": peak_memory_mb(),
        }
        self._sums = {}
        self._since = (time.monotonic(), self.tokens)
        self._add(row)
        return row

    def validate(self, step: int, stage: StageConfig) -> None:
        """Measures on the beginning of the validation text, and adds a row of kind "eval"."""
        with self._aside("eval"):
            if (model := self.setup.whole_model()) is None:
                return
            options = self.config.eval
            tokens = self.setup.valid[: options.tokens]
            with text_means(model) as means:
                figures = measure(
                    model, self.setup.base, tokens, options.context, options.batch_size, description="validation"
                )
            values = figures.to_dict()
            layers = [mechanism.summary() for mechanism in getattr(model, "mechanisms", [])]
            self._add(
                {
                    "kind": "eval",
                    "step": step,
                    "stage": stage.stage,
                    "eval_tokens": values.pop("tokens"),
                    **values,
                    "tokens": self.tokens,
                    "seconds": self.seconds,
                    **({"mechanisms": layers} if any(layers) else {}),
                    **({"means": means} if means else {}),
                }
            )
            logger.info("step %d: %s", step, describe(figures, self.setup.base is not None))
            value = figures.perplexity if self.setup.base is None else figures.kl
            if self.config.eval.keep == "best" and value < self.best[0]:
                weights = self.setup.trained_tensors(model)
                self.best = (value, {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()})

    def write_samples(self, step: int, stage: StageConfig) -> None:
        """Has base and variant continue the prompts, and adds a row of kind "samples"."""
        with self._aside("samples"):
            if (model := self.setup.whole_model()) is None:
                return
            base, options = self.setup.base, self.config.samples
            if self._base_texts is None and base is not None:
                self._base_texts = write_texts(base, self.setup.tokenizer, options, self.config.seed)
            texts = write_texts(model, self.setup.tokenizer, options, self.config.seed)
            base_texts = self._base_texts or [None] * len(texts)
            rows = [
                {"prompt": prompt, "base": base_text, "variant": text}
                for prompt, base_text, text in zip(options.prompts, base_texts, texts, strict=True)
            ]
            self._add({"kind": "samples", "step": step, "stage": stage.stage, "texts": rows})

    def last_figures(self, *, best: bool = True) -> Fidelity:
        """What was measured last on the validation text; with `eval.keep: best`, unless `best` says no, what was
        measured best."""
        rows = self.history.of_kind("eval")
        if best and self.best[1]:
            rows = [row for row in rows if self.best[0] in (row["kl"], row["perplexity"])]
        row = rows[-1]
        names = [field.name for field in fields(Fidelity) if field.name != "tokens"]
        return Fidelity(row["eval_tokens"], *(row[name] for name in names))

    @contextmanager
    def _aside(self, what: str) -> Iterator[None]:
        """Keeps the time of what is not training out of the tokens per second."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[what] = time.monotonic() - start
            self._since = (self._since[0] + self.durations[what], self._since[1])

    def _add(self, row: Row) -> None:
        if self.setup.accelerator.is_main_process:
            self.history.add(row)
            self.setup.accelerator.log(tracked(row), step=row["step"])


def tracked(row: Row) -> dict[str, float | str]:
    """A row as trackers take it: names to numbers, samples and changes as text; of a layer's weights, their mean."""
    kind = row["kind"]
    values = {
        f"{kind}/{name}": value
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("step", "tokens", "seconds")
    }
    if kind == "change":
        values["changes"] = "; ".join(row["changes"])
    for layer, summary in enumerate(row.get("mechanisms", [])):
        for name, numbers in summary.items():
            values[f"layer {layer}/{name}"] = float(torch.tensor(numbers).mean())
    for place, text in enumerate(row.get("texts", [])):
        values[f"samples/{place}"] = f"{text['prompt']}{text['variant']}"
    return values


def describe(figures: Fidelity, has_base: bool) -> str:
    """Figures as a person reads them."""
    if not has_base:
        return f"perplexity {figures.perplexity:.2f}"
    return (
        f"KL {figures.kl:.4f} nats/token, perplexity {figures.perplexity:.2f} (base {figures.base_perplexity:.2f}), "
        f"same top token {figures.top1_agreement:.1%}"
    )


def peak_memory_mb() -> float:
    """The most memory used so far, in MiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
