"""The training loop: stages of steps, with validation, samples, history and checkpoints on schedule."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from . import checkpointing
from .config import StageConfig
from .data import Blocks
from .fidelity import Fidelity, measure
from .history import History
from .optim import build_optimizers, is_mechanism, lr_factor, set_lr
from .samples import write_texts
from .setup import Setup
from .signals import StopRequest
from .stages import build_learner, trains

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """The run was asked to stop, and saved itself."""


class NonFiniteLossError(Exception):
    """The loss or the gradient is not finite."""


class Loop:
    """A run in progress.

    Attributes:
        step: optimiser steps done, over all stages.
        tokens: tokens trained on so far.
        history: what happened so far.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.config = setup.config
        self.accelerator = setup.accelerator
        self.main = setup.accelerator.is_main_process
        self.folder = Path(self.config.output)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.started = time.monotonic()
        self.window: dict[str, float] = {}  # sums over the steps since the last row of the history
        self.window_started = (time.monotonic(), 0)
        self.best: tuple[float, dict[str, Tensor]] = (math.inf, {})
        self.base_texts: list[str] | None = None
        self.stage_seconds: dict[int, float] = {}
        self.history = History(None)

    def fit(self) -> None:
        """Runs all stages, from the newest checkpoint if the config says so.

        Raises:
            StoppedError: after a signal; a checkpoint was written.
            NonFiniteLossError: naming step and batch; earlier checkpoints stay.
            attention.CheckpointError: if a checkpoint could not be written.
        """
        snapshot = self._restore()
        self.stop = StopRequest()
        first = snapshot.state["stage"] if snapshot else 0
        total = sum(self._steps(stage) for stage in self.config.stages)
        try:
            with tqdm(
                total=total, initial=self.step, unit="step", disable=not self.main, dynamic_ncols=True
            ) as self.bar:
                if snapshot is None:
                    self._measure_and_sample(self.config.stages[0])
                for index in range(first, len(self.config.stages)):
                    self._run_stage(index, snapshot if index == first else None)
        finally:
            self.stop.close()
        self._keep_best()

    def _steps(self, stage: StageConfig) -> int:
        return 1 if self.config.dry_run else stage.steps

    def _run_stage(self, index: int, snapshot: checkpointing.Snapshot | None) -> None:
        stage = self.config.stages[index]
        learner = build_learner(stage, self.setup.model, self.setup.base)
        learner.train()
        optimizers = build_optimizers(stage, learner)
        learner, *optimizers = self.accelerator.prepare(learner, *optimizers)
        done = 0
        if snapshot is not None:
            checkpointing.restore_optimizers(optimizers, snapshot.optimizers)
            done = snapshot.state["stage_step"]
            self._restore_rng(snapshot.rng)
        while done < self._steps(stage):
            self._train_step(index, done, learner, optimizers)
            done += 1
            self.step += 1
            self._after_step(index, done, optimizers)
        self.accelerator.free_memory()

    def _train_step(self, index: int, done: int, learner: nn.Module, optimizers: list[Optimizer]) -> None:
        stage = self.config.stages[index]
        started = time.monotonic()
        set_lr(optimizers, lr_factor(stage.schedule, done, stage.steps))
        batch, first = self._batch(index, done)
        predicted = len(batch) * (batch.shape[1] - 1)
        sums = self._accumulate(learner, self._own_part(stage, batch), predicted)
        norm = self._clip(stage, learner)
        values = {name: value / predicted for name, value in sums.items()}
        values["grad_norm"] = float(norm)
        self._check_finite(values, stage, first, len(batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, value in {**values, "steps": 1.0}.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.tokens += batch.numel()
        self.stage_seconds[index] = time.monotonic() - started

    def _batch(self, index: int, done: int) -> tuple[Tensor, int]:
        """The (B, T) tokens of a step of a stage, all processes' together, and the index of its first block."""
        stage = self.config.stages[index]
        context, size, since, part = stage.context, stage.batch_size, 0, 0
        final = stage.steps - round(stage.final_fraction * stage.steps)
        if stage.final_context and done >= final:
            context, size, since, part = stage.final_context, size * context // stage.final_context, final, 1
        seed = np.random.SeedSequence((self.config.seed, index, part)).generate_state(1)[0]
        first = (done - since) * size
        key = (index, part)
        if getattr(self, "_blocks_key", None) != key:
            self._blocks_key, self._blocks = key, Blocks(self.setup.train, context, int(seed))
        return self._blocks.batch(first, size), first

    def _own_part(self, stage: StageConfig, batch: Tensor) -> list[Tensor]:
        """This process's rows of a batch, in micro-batches."""
        own = batch[self.accelerator.process_index :: self.accelerator.num_processes].to(self.accelerator.device)
        rows = stage.micro_batch_size or len(own)
        return list(own.split(max(1, rows * stage.context // own.shape[1])))

    def _accumulate(self, learner: nn.Module, parts: list[Tensor], predicted: int) -> dict[str, float]:
        """Gradients of the mean loss of a step over all its tokens; returns sums over the tokens of all processes."""
        # DDP averages over processes; the mean over all tokens needs the sum.
        scale = self.accelerator.num_processes / predicted
        sums: dict[str, Tensor] = {}
        for place, part in enumerate(parts):
            last = place == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(learner):
                with self.accelerator.autocast():
                    losses = learner(part)
                self.accelerator.backward(losses.loss * scale)
            for name, value in {"loss": losses.loss.detach(), **losses.terms}.items():
                sums[name] = sums[name] + value if name in sums else value
        names = list(sums)
        totals = self.accelerator.reduce(torch.stack([sums[name].float() for name in names]))
        return dict(zip(names, totals.tolist(), strict=True))

    def _clip(self, stage: StageConfig, learner: nn.Module) -> Tensor:
        trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        return self.accelerator.clip_grad_norm_(trained, stage.clip or math.inf)

    def _check_finite(self, values: dict[str, float], stage: StageConfig, first: int, size: int) -> None:
        scaled = self.accelerator.scaler is not None  # then an infinite gradient is a step that the scaler skips
        wrong = [
            name for name, value in values.items() if not math.isfinite(value) and not (scaled and name == "grad_norm")
        ]
        if wrong:
            raise NonFiniteLossError(
                f"step {self.step + 1} (stage {stage.stage}, blocks {first} to {first + size - 1}): "
                f"{', '.join(f'{name} is {values[name]}' for name in wrong)}. The weights before this step are in the "
                f"last checkpoint under {self.folder / 'checkpoints'}; try a lower learning rate or full precision"
            )

    # What happens between steps.

    def _after_step(self, index: int, done: int, optimizers: list[Optimizer]) -> None:
        stage, config = self.config.stages[index], self.config
        ends = done == self._steps(stage)
        if self.step % config.log_every == 0 or ends:
            self._log(stage, optimizers)
        if ends or (config.eval.every and self.step % config.eval.every == 0):
            self._validate(stage)
        if (ends and index == len(config.stages) - 1) or (
            config.samples.every and self.step % config.samples.every == 0
        ):
            self._write_samples(stage)
        self.bar.update()
        stopped = self._stop_asked()
        every = config.checkpoint.every
        if stopped or ends or (every and self.step % every == 0):
            self._save_checkpoint(index, done, optimizers)
        if stopped:
            raise StoppedError

    def _stop_asked(self) -> bool:
        """Whether any process was asked to stop; the same answer on all."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        asked = torch.tensor([float(self.stop.asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked).item())

    def _log(self, stage: StageConfig, optimizers: list[Optimizer]) -> None:
        count = self.window.pop("steps")
        since, tokens = self.window_started
        rates = {
            "mechanism_lr" if group["peak_lr"] == stage.mechanism_lr else "lr": group["lr"]
            for optimizer in optimizers
            for group in optimizer.param_groups
        }
        row = {
            "kind": "train",
            "step": self.step,
            "stage": stage.stage,
            **{name: value / count for name, value in self.window.items()},
            **rates,
            "tokens": self.tokens,
            "seconds": self._elapsed(),
            "tokens_per_second": (self.tokens - tokens) / (time.monotonic() - since),
            "peak_memory_mb": peak_memory_mb(),
        }
        self._record(row)
        self.bar.set_description(stage.stage)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tok/s")
        self.window = {}
        self.window_started = (time.monotonic(), self.tokens)

    def _record(self, row: dict[str, Any]) -> None:
        if self.main:
            self.history.add(row)
        scalars = {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
        self.accelerator.log(scalars, step=self.step)

    def _elapsed(self) -> float:
        return round(self.seconds + time.monotonic() - self.started, 2)

    def _measure_and_sample(self, stage: StageConfig) -> None:
        self._validate(stage)
        if self.config.samples.every:
            self._write_samples(stage)

    def _validate(self, stage: StageConfig) -> Fidelity | None:
        paused = time.monotonic()
        figures = None
        if self.main:
            figures = self.measure_valid()
            layers = [mechanism.summary() for mechanism in getattr(self.setup.model, "mechanisms", [])]
            values = figures.to_dict()
            self._record(
                {
                    "kind": "eval",
                    "step": self.step,
                    "stage": stage.stage,
                    "eval_tokens": values.pop("tokens"),
                    **values,
                    "tokens": self.tokens,
                    "seconds": self._elapsed(),
                    **({"mechanisms": layers} if any(layers) else {}),
                }
            )
            logger.info("step %d: %s", self.step, describe(figures, self.setup.base is not None))
            self._remember_best(figures)
        self.accelerator.wait_for_everyone()
        self._not_training(paused)
        return figures

    def _not_training(self, since: float) -> None:
        """Takes the time since then out of the tokens per second of the next row."""
        start, tokens = self.window_started
        self.window_started = (start + time.monotonic() - since, tokens)

    def measure_valid(self) -> Fidelity:
        """Measures on the beginning of the validation text."""
        options = self.config.eval
        tokens = self.setup.valid[: options.tokens]
        return measure(
            self.setup.model, self.setup.base, tokens, options.context, options.batch_size, description="eval"
        )

    def _remember_best(self, figures: Fidelity) -> None:
        value = figures.perplexity if self.setup.base is None else figures.kl
        if self.config.eval.keep == "best" and value < self.best[0]:
            self.best = (value, {name: tensor.clone() for name, tensor in self.trained_tensors().items()})

    def _keep_best(self) -> None:
        if self.best[1]:
            checkpointing.restore_weights(self.setup.model, self.best[1])

    def _write_samples(self, stage: StageConfig) -> None:
        if not self.main:
            return
        paused = time.monotonic()
        options, setup = self.config.samples, self.setup
        settings = {"length": options.length, "temperature": options.temperature, "seed": self.config.seed}
        if self.base_texts is None and setup.base is not None:
            self.base_texts = write_texts(setup.base, setup.tokenizer, options.prompts, **settings)
        texts = write_texts(setup.model, setup.tokenizer, options.prompts, **settings)
        base_texts = self.base_texts or [None] * len(texts)
        rows = [
            {"prompt": prompt, "base": base, "variant": text}
            for prompt, base, text in zip(options.prompts, base_texts, texts, strict=True)
        ]
        self._record({"kind": "samples", "step": self.step, "stage": stage.stage, "texts": rows})
        self._not_training(paused)

    # Checkpoints.

    def trained_tensors(self) -> dict[str, Tensor]:
        """The tensors that the run changes, whole, by name."""
        model = self.setup.model
        tied = model.config.tie_word_embeddings
        return {
            name: checkpointing.whole(tensor).detach()
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
            and (is_mechanism(name) or any(trains(stage, name) for stage in self.config.stages))
        }

    def _save_checkpoint(self, index: int, done: int, optimizers: list[Optimizer]) -> None:
        weights = self.trained_tensors()
        memory = checkpointing.optimizer_tensors(optimizers)
        rng = self._rng()
        state = {
            "stage": index,
            "stage_step": done,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self._elapsed(),
            "window": self.window,
            "best": self.best[0] if math.isfinite(self.best[0]) else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "history": self.history.rows,
            "processes": self.accelerator.num_processes,
        }
        if self.main:
            snapshot = checkpointing.Snapshot(weights, memory, self.best[1], rng, state)
            checkpointing.write(self.folder / "checkpoints", snapshot, self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> checkpointing.Snapshot | None:
        snapshot = checkpointing.read_newest(self.folder / "checkpoints") if self.config.resume else None
        path = self.folder / "training.jsonl" if self.main else None
        if snapshot is None:
            if self.config.resume and self.main:
                logger.info("no checkpoint in %s to resume from; starting", self.folder)
            self.history = History(path)
            return None
        state = snapshot.state
        checkpointing.restore_weights(self.setup.model, snapshot.weights)
        self.history = History(path, state["history"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.window = state["window"]
        self.window_started = (time.monotonic(), self.tokens)
        self.best = (math.inf if state["best"] is None else state["best"], snapshot.best)
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        logger.info("resuming after step %d", self.step)
        return snapshot

    def _rng(self) -> dict[str, Tensor]:
        """States of every process's generators; whole on the main process."""
        own = {f"{self.accelerator.process_index}.cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            own[f"{self.accelerator.process_index}.cuda"] = torch.cuda.get_rng_state()
        return {name: tensor for part in gather_object([own]) for name, tensor in part.items()}

    def _restore_rng(self, states: dict[str, Tensor]) -> None:
        index = self.accelerator.process_index
        if f"{index}.cpu" in states:
            torch.set_rng_state(states[f"{index}.cpu"])
        if f"{index}.cuda" in states and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(states[f"{index}.cuda"])


def describe(figures: Fidelity, has_base: bool) -> str:
    """Figures as a person reads them."""
    if not has_base:
        return f"perplexity {figures.perplexity:.2f}"
    return (
        f"KL {figures.kl:.4f} nats/token, perplexity {figures.perplexity:.2f} (base {figures.base_perplexity:.2f}), "
        f"same top token {figures.top1_agreement:.1%}"
    )


def peak_memory_mb() -> float:
    """The most memory used so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
