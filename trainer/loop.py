"""The training loop: stages of steps, with validation, samples, history and checkpoints on schedule."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from . import checkpointing, resume
from .checkpointing import Snapshot
from .config import StageConfig
from .data import StageBatches
from .export import Publisher, save_variant
from .observer import Observer
from .optim import build_optimizers, lr_factor, set_lr
from .setup import Setup
from .signals import StopRequest
from .stages import build_learner, name_layers

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """The run was asked to stop, and saved itself."""


class NonFiniteError(Exception):
    """The loss, the gradient or a weight is not finite."""


class Loop:
    """A run in progress.

    Attributes:
        step: optimiser steps done, over all stages.
        observer: keeps the history.
        publisher: pushes to the Hub, if the config says where.
        step_seconds: what the last step of each stage took.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.config = setup.config
        self.accelerator = setup.accelerator
        self.checkpoints = Path(self.config.output) / "checkpoints"
        self.observer = Observer(setup)
        self.publisher = Publisher(self.config.push_to, private=self.config.private) if self.config.push_to else None
        self.snapshot: Snapshot | None = None
        self.step = 0
        self.trained: dict[str, list[int]] = {}  # by the optimisers of the stage; see `checkpointing.trained_shapes`
        self.step_seconds = [0.0] * len(self.config.stages)

    def restore(self) -> None:
        """Takes up the newest intact checkpoint if the config says so, and opens the history.

        Raises:
            ValueError: if the config does not say so, and the folder holds an unfinished run; if it does, and the run
                cannot go on under it.
        """
        snapshot = checkpointing.read_newest(self.checkpoints)
        if snapshot is not None and not self.config.resume:
            if not snapshot.state["finished"]:
                raise ValueError(
                    f"{self.config.output} holds a run that stopped after step {snapshot.state['step']}: go on with it "
                    "by --resume, choose another --output, or delete it"
                )
            snapshot = None
        changes = [] if snapshot is None else self._changes(snapshot)
        if snapshot is not None:
            self._take_up(snapshot)
        elif self.config.resume:
            logger.info("%s has no intact checkpoint to resume from; starting", self.checkpoints)
        history = Path(self.config.output) / "training.jsonl" if self.setup.is_main else None
        self.observer.open(history, snapshot and snapshot.state["observer"])
        if changes:
            self.observer.record_changes(self.step, self.config.stages[snapshot.state["stage"]], changes)

    def _changes(self, snapshot: Snapshot) -> list[str]:
        """What is learnt or measured otherwise from a checkpoint on; also in the log.

        Raises:
            ValueError: naming all changes under which the run cannot go on.
        """
        state, now = snapshot.state, self.setup.record
        if "record" not in state:
            raise ValueError(
                f"the checkpoints in {self.checkpoints} are of an earlier version, which did not record what a run was "
                "made from: finish it with that version, or choose another --output"
            )
        verdict = resume.compare(state["record"], now, resume.Place(state["stage"], state["stage_step"]))
        if not verdict.refused:
            verdict.refused = resume.compare_trained(state["trained"], self._trained(state["stage"]))
        if verdict.refused:
            raise ValueError(
                f"the run in {self.config.output}, which has made {state['step']} steps, cannot go on like this:\n- "
                + "\n- ".join(verdict.refused)
                + "\nGive what it was given before (config.yaml has it), or choose another --output"
            )
        if verdict.harmless:
            logger.info("changed without effect on the training: %s", "; ".join(verdict.harmless))
        if verdict.noted:
            logger.info("changed from step %d on: %s", state["step"], "; ".join(verdict.noted))
        return verdict.noted

    def _trained(self, index: int) -> dict[str, list[int]]:
        """What each optimiser of a stage will train."""
        stage = self.config.stages[index]
        learner = build_learner(stage, self.setup.model, self.setup.base)
        learner.close()
        return checkpointing.trained_shapes(build_optimizers(stage, learner), self.setup.model)

    def _take_up(self, snapshot: Snapshot) -> None:
        checkpointing.restore_weights(self.setup.model, snapshot.weights)
        self.snapshot = snapshot
        self.step = snapshot.state["step"]
        if self.config.eval.keep == "best" and snapshot.best:
            now = self.setup.trained_tensors(self.setup.model)  # some, perhaps, only by stages that were not there then
            untouched = {name: now[name].to("cpu", copy=True) for name in now.keys() - snapshot.best.keys()}
            self.observer.best = (snapshot.state["best"], untouched | snapshot.best)
        if snapshot.state["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
        logger.info("resuming after step %d", self.step)

    def fit(self) -> None:
        """Runs all stages, from where `restore` left them.

        Raises:
            StoppedError: after a signal; a checkpoint was written.
            NonFiniteError: naming step and batch; earlier checkpoints stay.
            attention.CheckpointError: if a checkpoint could not be written.
        """
        snapshot, self.snapshot = self.snapshot, None
        first, done = (snapshot.state["stage"], snapshot.state["stage_step"]) if snapshot else (0, 0)
        total = self.step + sum(map(self._steps, self.config.stages[first:])) - done
        self.stop = StopRequest()
        try:
            with tqdm(initial=self.step, total=total, unit="step", disable=not self.setup.is_main) as self.bar:
                if snapshot is None:
                    self.observer.validate(0, self.config.stages[0])
                for index in range(first, len(self.config.stages)):
                    self._run_stage(index, snapshot if index == first else None)
        finally:
            self.stop.close()

    @property
    def _partitioned(self) -> bool:
        """Whether the optimiser's memory is spread over processes in a form that only DeepSpeed reads."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _steps(self, stage: StageConfig) -> int:
        return 1 if self.config.dry_run else stage.steps

    def _batch_of(self, stage: StageConfig, done: int) -> int:
        """The batch of the next step; in a dry run the stage's last, whose context is the longest."""
        return stage.steps - 1 if self.config.dry_run else done

    def _run_stage(self, index: int, snapshot: Snapshot | None) -> None:
        stage = self.config.stages[index]
        built = build_learner(stage, self.setup.model, self.setup.base, self.setup.teacher_cache).train()
        plain = build_optimizers(stage, built)
        self.trained = checkpointing.trained_shapes(plain, self.setup.model)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            name_layers(self.accelerator.state.fsdp_plugin, built)
        learner, *optimizers = self.accelerator.prepare(built, *plain)
        batches = StageBatches(self.setup.train, stage, (self.config.seed, index))
        done = 0
        if snapshot is not None:
            done = snapshot.state["stage_step"]
            if self._partitioned:
                logger.warning("under DeepSpeed the optimiser starts anew: the end will be close, not equal")
            else:
                checkpointing.restore_optimizers(optimizers, self.setup.model, snapshot.optimizers)
            self._restore_rng(snapshot.rng)
            if not snapshot.state["finished"]:
                self._measure(index, done, optimizers)
        while done < self._steps(stage):
            started = time.monotonic()
            set_lr(optimizers, lr_factor(stage.schedule, done, stage.steps))
            self.train_step(stage, learner, optimizers, *batches(self._batch_of(stage, done)))
            self.step_seconds[index] = time.monotonic() - started
            done += 1
            self._after_step(index, done, optimizers)
        built.close()
        self.accelerator.free_memory()

    def train_step(
        self, stage: StageConfig, learner: nn.Module, optimizers: list[Optimizer], batch: Tensor, first: int
    ) -> None:
        """One optimiser step on a batch (B, T), whose first sequence is block `first` of the text."""
        predicted = len(batch) * stage.predicted(batch.shape[1])
        sums = self._accumulate(learner, self._own_part(stage, batch), predicted)
        values = {name: value / predicted for name, value in sums.items()}
        trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        values["grad_norm"] = float(self.accelerator.clip_grad_norm_(trained, stage.clip or math.inf))
        self._check_finite(values, stage, first, len(batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        for mechanism in getattr(self.setup.model, "mechanisms", []):
            mechanism.after_step(self.step)
        self.observer.count(values, batch.numel())

    def _own_part(self, stage: StageConfig, batch: Tensor) -> list[Tensor]:
        """This process's rows of a batch, in micro-batches of as many tokens as the stage allows."""
        own = batch[self.accelerator.process_index :: self.accelerator.num_processes].to(self.accelerator.device)
        if stage.micro_batch_size is None:
            return [own]
        return list(own.split(max(1, stage.micro_batch_size * stage.context // own.shape[1])))

    def _accumulate(self, learner: nn.Module, parts: list[Tensor], predicted: int) -> dict[str, float]:
        """Gradients of the mean loss of a step over all its tokens; returns sums over the tokens of all processes."""
        scale = self.accelerator.num_processes / predicted  # as gradients are averaged over processes
        sums: dict[str, Tensor] = {}
        for place, part in enumerate(parts):
            last = place == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(learner):
                losses = learner(part)
                self.accelerator.backward(losses.loss * scale)
            for name, value in {"loss": losses.loss.detach(), **losses.terms}.items():
                sums[name] = sums[name] + value if name in sums else value
        totals = self.accelerator.reduce(torch.stack([value.float() for value in sums.values()]))
        return dict(zip(sums, totals.tolist(), strict=True))

    def _check_finite(self, values: dict[str, float], stage: StageConfig, first: int, size: int) -> None:
        if self.accelerator.scaler is not None:  # then an infinite gradient is a step that the scaler skips
            values = {name: value for name, value in values.items() if name != "grad_norm"}
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            batch = f"stage {stage.stage}, blocks {first} to {first + size - 1} of the text"
            raise self._diverged(f"step {self.step + 1} ({batch}): {', '.join(wrong)}")

    def _check_weights(self, stage: StageConfig) -> None:
        """Checks, before anything is measured or saved, that the last step left finite weights."""
        tensors = self.setup.trained_tensors(self.setup.model)
        if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise self._diverged(f"step {self.step} (stage {stage.stage}) left weights that are not finite: {wrong}")

    def _diverged(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{what}. The run stops here; the last checkpoint, from before, is kept in {self.checkpoints}. "
            "Try a lower learning rate, or --precision no"
        )

    def _after_step(self, index: int, done: int, optimizers: list[Optimizer]) -> None:
        """What is due after a step. The checkpoint comes first: whatever fails after it, the step is not lost."""
        stage, config = self.config.stages[index], self.config
        stage_ends = done == self._steps(stage)
        run_ends = stage_ends and index == len(config.stages) - 1
        stopped = self._stop_asked()
        saves = self._due(config.checkpoint.every) or stage_ends or stopped
        if saves or self._due(config.eval.every) or self._due(config.samples.every) or self._push_due():
            self._check_weights(stage)
        if self._due(config.log_every) or stage_ends:
            row = self.observer.record_losses(self.step, stage, optimizers)
            self.bar.set_description(stage.stage, refresh=False)
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tok/s", refresh=False)
        self.bar.update()
        if saves:
            self._save_checkpoint(index, done, optimizers)
        if stopped and not run_ends:
            raise StoppedError
        try:
            self._measure(index, done, optimizers)
        except Exception:
            if not saves and self.accelerator.num_processes == 1:  # several would have to fail together
                self._save_checkpoint(index, done, optimizers)
            raise
        if self._push_due() and not run_ends:
            self._push_behind()

    def _measure(self, index: int, done: int, optimizers: list[Optimizer]) -> None:
        """Validation and samples that are due after step `done` of a stage; then a run at its end is finished.

        Also what a run that goes on from such a step begins with: what its history, written before, does not have.
        """
        stage = self.config.stages[index]
        stage_ends = done == self._steps(stage)
        run_ends = stage_ends and index == len(self.config.stages) - 1
        has = {row["kind"] for row in self.observer.history.rows if row["step"] == self.step}
        # A push, too: its card says what the weights beside it reach.
        if (self._due(self.config.eval.every) or stage_ends or self._push_due()) and "eval" not in has:
            self.observer.validate(self.step, stage)
        if (self._due(self.config.samples.every) or run_ends) and "samples" not in has:
            self.observer.write_samples(self.step, stage)
        if run_ends:
            self._save_checkpoint(index, done, optimizers, finished=True)

    def _push_behind(self) -> None:
        model = self.setup.whole_model()
        if model is not None:
            figures = self.observer.last_figures(best=False)
            self.publisher.push_behind(save_variant(self.setup, self.observer, model, self.step, figures))

    def _push_due(self) -> bool:
        return self.publisher is not None and self._due(self.config.push_every)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _stop_asked(self) -> bool:
        """Whether any process was asked to stop; the same answer on all."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        asked = torch.tensor([float(self.stop.asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked).item())

    def _save_checkpoint(self, index: int, done: int, optimizers: list[Optimizer], finished: bool = False) -> None:
        scaler = self.accelerator.scaler
        snapshot = Snapshot(
            weights=self.setup.trained_tensors(self.setup.model),
            optimizers={} if self._partitioned else checkpointing.optimizer_tensors(optimizers, self.setup.model),
            best=self.observer.best[1],
            rng=self._rng(),
            state={
                "stage": index,
                "stage_step": done,
                "finished": finished,
                "step": self.step,
                "record": self.setup.record,
                "trained": self.trained,
                "best": self.observer.best[0] if self.observer.best[1] else None,
                "scaler": None if scaler is None else scaler.state_dict(),
                "observer": self.observer.state(),
            },
        )
        if self.setup.is_main:
            checkpointing.write(self.checkpoints, snapshot, self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _rng(self) -> dict[str, Tensor]:
        """States of every process's generators, by process and device."""
        own = {f"{self.accelerator.process_index}.cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            own[f"{self.accelerator.process_index}.cuda"] = torch.cuda.get_rng_state()
        return {name: tensor for part in gather_object([own]) for name, tensor in part.items()}

    def _restore_rng(self, states: dict[str, Tensor]) -> None:
        cpu, cuda = (states.get(f"{self.accelerator.process_index}.{device}") for device in ("cpu", "cuda"))
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(cuda)
