"""The models that the app can use: found at start or added later, loaded when first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Entry:
    """A model that can be chosen, loaded or not.

    Attributes:
        name: unique, short; what pickers, links and endpoints say.
        source: what `attention.load` takes.
        folder: where its files lie, None until they are pulled.
        method: a key of `attention.METHODS`; "softmax" for a base.
        description: the method in one line.
        options: the method's options, empty for a base.
    """

    name: str
    source: str
    folder: Path | None
    method: str
    description: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        return self.method == "softmax"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in evaluation mode and float32; `base` is the one that it was made from, itself for a base."""

    entry: Entry
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: LoadedModel | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def method(self) -> str:
        return self.entry.method

    @property
    def context(self) -> int:
        """Tokens that the model can hold."""
        return self.model.config.n_positions


class ModelStore:
    """Models by name. Thread-safe; loading one does not stop others from being used."""

    def __init__(self, sources: list[str]):
        raise NotImplementedError

    def names(self) -> list[str]:
        """Every model that can be chosen, bases first."""
        raise NotImplementedError

    def entry(self, name: str) -> Entry:
        """What is known of a model without loading it.

        Raises:
            KeyError: if there is none of that name.
        """
        raise NotImplementedError

    def get(self, name: str) -> LoadedModel:
        """The model, loaded if it is not; waits while another thread loads it.

        Raises:
            KeyError: if there is none of that name.
            LoadError: if it cannot be loaded; the message says why and what to do.
        """
        raise NotImplementedError
