"""Writing what was trained to its folder, with card, history and curves, and pushing it to the Hub."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from transformers import PreTrainedModel

import attention
from attention import CheckpointError
from attention.files import replaced, write_manifest
from attention.registry import config_from_dict

from .card import Making, write_card
from .fidelity import Fidelity
from .history import plot
from .observer import Observer
from .setup import Setup, environment

logger = logging.getLogger(__name__)
CURVES = "curves.png"


def save_base(setup: Setup, model: PreTrainedModel, place: Path) -> None:
    """Writes a pretrained base as a plain Hugging Face folder, complete or not at all."""
    with replaced(place) as new:
        model.save_pretrained(new)
        setup.tokenizer.save_pretrained(new)
        write_manifest(new)


def save_variant(
    setup: Setup,
    observer: Observer,
    model: attention.Variant,
    step: int,
    valid: Fidelity,
    test: tuple[str, Fidelity] | None = None,
) -> Path:
    """Writes a variant with its card, history and curves; returns its folder.

    Args:
        step: optimiser steps so far.
        valid: what was measured of this model's weights on the validation text, for the card.
        test: name of a text that guided nothing and what was measured on it, for the card.
    """
    folder = Path(setup.config.output)
    place = folder / "variant"
    making = Making(
        config=setup.config,
        method=config_from_dict(model.config.attention),
        family=model.config.family,
        environment=environment(),
        tokens=observer.tokens,
        steps=step,
        seconds=observer.seconds,
        earlier=setup.earlier,
        changes={row["step"]: row["changes"] for row in observer.history.rows if row["kind"] == "change"},
    )
    card = write_card(making, valid, test)
    history = observer.history
    attention.save(model, place, base=setup.base, tokenizer=setup.tokenizer, card=card, history=history.path)
    plot(history.rows, folder / CURVES)
    shutil.copyfile(folder / CURVES, place / CURVES)
    return place


class Publisher:
    """Pushes a variant to the Hub, at most one push at a time, and never fails: what went wrong is in the log."""

    def __init__(self, to: str, *, private: bool):
        self.to = to
        self.private = private
        self._thread: threading.Thread | None = None

    def push(self, folder: Path, *, dry_run: bool = False) -> str | None:
        """Pushes now, or only lists what would go; returns what `attention.load` takes to get it, or None."""
        self.wait()
        return self._push(folder, dry_run)

    def push_behind(self, folder: Path) -> None:
        """Pushes in the background, unless the last such push still goes on."""
        if self._thread is not None and self._thread.is_alive():
            logger.info("the last push to %s still goes on; this one is left out", self.to)
            return
        self._thread = threading.Thread(target=self._push, args=(folder,), name="push", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until no push goes on."""
        if self._thread is not None:
            self._thread.join()

    def _push(self, folder: Path, dry_run: bool = False) -> str | None:
        try:
            done = attention.push(folder, self.to, private=self.private, dry_run=dry_run)
        except (CheckpointError, OSError, ValueError) as error:
            logger.warning("not pushed: %s", error)
            return None
        if dry_run:
            files = "".join(f"\n{size:>12,}  {path}" for path, size in done.files.items())
            logger.info("would be pushed to %s:%s", self.to, files)
        else:
            logger.info("pushed %s", done.url)
        return done.spec
