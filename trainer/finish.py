"""The end of a run: the model and its figures, a summary; for a dry run, an estimate."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import numpy as np

import attention

from .checkpointing import restore_weights
from .export import save_base, save_variant
from .fidelity import Fidelity, measure
from .loop import Loop
from .observer import describe, peak_memory_mb

logger = logging.getLogger(__name__)


def finish(loop: Loop) -> None:
    """Saves the model, measures what was saved, pushes it, and says what was reached.

    Raises:
        attention.CheckpointError: if it could not be saved; the run's checkpoints are there to resume from.
    """
    setup = loop.setup
    if (model := setup.whole_model()) is None:
        return
    restore_weights(model, loop.observer.best[1])
    test = pushed = None
    if setup.base is None:
        place = Path(loop.config.output) / "model"
        save_base(setup, model, place)
    else:
        valid = loop.observer.last_figures()
        place = save_variant(setup, loop.observer, model, loop.step, valid)
        if setup.test is not None:
            test = measure_saved(loop, place, *setup.test)
            save_variant(setup, loop.observer, model, loop.step, valid, test)
        if loop.publisher is not None:
            pushed = loop.publisher.push(place, dry_run=loop.config.dry_run)
    logger.info("%s", summary(loop, place, test, pushed))
    if loop.config.dry_run:
        logger.info("%s", estimate(loop))


def measure_saved(loop: Loop, place: Path, name: str, tokens: np.ndarray) -> tuple[str, Fidelity]:
    """Measures a saved variant on the text of that name."""
    options, base = loop.config.eval, loop.setup.base
    variant, _ = attention.load(place, base=base)
    return name, measure(variant, base, tokens, options.context, options.batch_size, description=name)


def summary(loop: Loop, place: Path, test: tuple[str, Fidelity] | None, pushed: str | None) -> str:
    """What was reached, what it cost, where it lies, and how to see it."""
    observer, has_base = loop.observer, loop.setup.base is not None
    lines = [
        "done",
        f"reached  {describe(observer.last_figures(), has_base)} on the validation text",
        *([f"         {describe(test[1], has_base)} on {test[0]}"] if test is not None else []),
        f"cost     {observer.tokens:,} tokens in {loop.step:,} steps, {observer.seconds:,.0f} s, "
        f"{peak_memory_mb():,.0f} MB at most",
        f"saved    {place}",
        *([f"pushed   {pushed}"] if pushed is not None and not loop.config.dry_run else []),
        f"see it   {shlex.join(['python', 'app.py', '--checkpoints', str(place)])}",
    ]
    return "\n".join(lines)


def estimate(loop: Loop) -> str:
    """What the whole run would take, going by one step of each stage and one validation."""
    config, durations = loop.config, loop.observer.durations
    steps = [stage.steps for stage in config.stages]
    training = sum(count * seconds for count, seconds in zip(steps, loop.step_seconds, strict=True))
    validations = len(steps) + (sum(steps) // config.eval.every if config.eval.every else 0)
    samples = 1 + (sum(steps) // config.samples.every if config.samples.every else 0)
    aside = validations * durations.get("eval", 0.0) + samples * durations.get("samples", 0.0)
    return (
        f"the whole run: {sum(steps):,} steps, about {(training + aside) / 60:,.1f} minutes, {training / 60:,.1f} of "
        f"them training, and at least {peak_memory_mb():,.0f} MB. First steps are slow, so it may take less"
    )
