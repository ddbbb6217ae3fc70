"""The finished run that a visitor sees before pressing anything; `python -m demo.example` makes it anew."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from .engine import Generation
from .limits import Limits
from .models import LoadError, ModelStore, bundled
from .runs import Column, Run, Settings
from .timing import here_and_now

logger = logging.getLogger(__name__)

ELSEWHERE = "on another machine, when this example was made"

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
FILE = Path(__file__).with_name("examples") / "first.json"
STORY = Path(__file__).with_name("examples") / "lighthouse.txt"
PROMPTS = {
    "A lighthouse (long)": STORY.read_text(encoding="utf-8"),
    "A house": "The old house stood at the end of the lane, and",
    "A ship": "It was a dark night when the ship left the harbour. The captain",
    "A detective": '"My dear fellow," said the detective, lighting his pipe, "there is one thing that you have',
    "A little girl": "Once upon a time there was a little girl who lived with her grandmother in a",
}
EXAMPLE_PROMPT = PROMPTS["A lighthouse (long)"]


@dataclass(frozen=True)
class Example:
    """A run and the models that it was made with.

    Attributes:
        fingerprints: SHA-256 of each model's files, by name.
    """

    fingerprints: dict[str, str]
    run: Run


_EXAMPLE = TypeAdapter(Example)


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model's config and weights."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def ticked(store: ModelStore) -> list[str]:
    """What is chosen on a page that was just opened: the plain models, those that the app was started with besides the
    bundled ones, and then these, as many as one run takes."""

    def key(name: str) -> tuple[bool, bool]:
        entry = store.entry(name)
        return not entry.is_base, entry.folder.resolve().is_relative_to(CHECKPOINTS)

    first = sorted(store.names(), key=key)[: store.limits.models_per_run]
    return [name for name in store.names() if name in first]


def example_settings(store: ModelStore, models: Iterable[str]) -> Settings:
    """The first prompt with the first of `models`, as many as one run takes."""
    names = tuple(models)[: store.limits.models_per_run]
    return Settings(EXAMPLE_PROMPT, names, max_new_tokens=min(120, store.limits.new_tokens))


def make(store: ModelStore) -> Example:
    """Runs the example."""
    generation = Generation(store, example_settings(store, store.names()))
    for _ in generation.stream():
        pass
    generation.run.measured = here_and_now()
    names = generation.run.settings.models
    return Example({name: fingerprint(store.entry(name).folder) for name in names}, generation.run)


def stored(store: ModelStore, file: Path = FILE) -> Run | None:
    """The run in `file`, if its models are here as they were when it was made; there may be more."""
    try:
        example = _EXAMPLE.validate_json(file.read_bytes())
        current = {name: fingerprint(store.entry(name).folder) for name in example.fingerprints}
    except (OSError, ValidationError, LoadError) as error:
        logger.info("no stored example: %s", error)
        return None
    expected = example_settings(store, example.run.settings.models)
    if example.run.settings != expected or current != example.fingerprints:
        return None
    example.run.measured = example.run.measured or ELSEWHERE
    return example.run


def write(example: Example, file: Path = FILE) -> None:
    """Stores an example as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_EXAMPLE.dump_json(example) + b"\n")


class FirstRun:
    """The example of one app: the stored one, or one made in the background where that is not of these models.

    Attributes:
        settings: what it is made with, known from the start.
    """

    def __init__(self, store: ModelStore):
        self._run = stored(store)
        self.settings = self._run.settings if self._run else example_settings(store, store.names())
        self._thread: threading.Thread | None = None
        if self._run is None and store.names():
            self._thread = threading.Thread(target=self._make, args=(store,), name="first-run")
            self._thread.start()

    def _make(self, store: ModelStore) -> None:
        run = make(store).run
        run.measured = ""
        self._run = run

    def waiting(self) -> Run:
        """The example before anything is written."""
        return Run(self.settings, [Column(name) for name in self.settings.models])

    def get(self, seconds: float = 0.0) -> Run | None:
        """The run, waiting for it up to `seconds`; None if there is none yet."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._run


if __name__ == "__main__":
    write(make(ModelStore(bundled(CHECKPOINTS), Limits(seconds=600))))
