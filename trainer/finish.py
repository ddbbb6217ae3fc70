"""What a run leaves: the model, its figures, its curves, a summary."""

from __future__ import annotations

import logging
from pathlib import Path

import attention
from attention.gpt2 import GPT2VariantLMHeadModel

from .data import read_files
from .fidelity import Fidelity, measure
from .history import plot
from .loop import Loop, describe

logger = logging.getLogger(__name__)


def finish(loop: Loop) -> None:
    """Saves the model, measures what was saved, and says what was reached."""
    if not loop.main:
        return
    plot(loop.history.rows, loop.folder / "curves.png")
    if isinstance(loop.setup.model, GPT2VariantLMHeadModel):
        place = loop.folder / "variant"
        attention.save(
            loop.setup.model,
            place,
            base=loop.setup.base,
            tokenizer=loop.setup.tokenizer,
            history=loop.history.rows,
            state_dict=None,
        )
        figures = _measure_saved(loop, place)
    else:
        place = loop.folder / "model"
        save_base(loop, place)
        figures = None
    logger.info("%s", summary(loop, place, figures))


def save_base(loop: Loop, place: Path) -> None:
    """Writes a pretrained base as a plain Hugging Face folder."""
    model = loop.setup.model
    model.save_pretrained(place)
    loop.setup.tokenizer.save_pretrained(place)


def _measure_saved(loop: Loop, place: Path) -> Fidelity | None:
    options = loop.config.eval
    if options.text is None:
        return None
    variant, tokenizer = attention.load(place, base=loop.setup.base)
    tokens = read_files([options.text], tokenizer)
    return measure(variant, loop.setup.base, tokens, options.context, options.batch_size, description=options.text)


def summary(loop: Loop, place: Path, figures: Fidelity | None) -> str:
    """What was reached, what it cost, where it lies, and how to see it."""
    last = loop.history.of_kind("eval")[-1]
    reached = f"perplexity {last['perplexity']:.2f}"
    if loop.setup.base is not None:
        reached = f"KL {last['kl']:.4f} nats/token, {reached} (base {last['base_perplexity']:.2f})"
    lines = [
        f"reached  {reached} on validation text",
        *([f"         {describe(figures, True)} on {loop.config.eval.text}"] if figures else []),
        f"cost     {loop.tokens:,} tokens, {loop.step:,} steps, {loop._elapsed():,.0f} s",
        f"saved    {place}",
        f"see it   python app.py --checkpoints {place}",
    ]
    return "\n".join(["done", *lines])
