"""The models that the app can use: found at start or added later, loaded when first asked for."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import attention
from attention.gpt2 import GPT2VariantConfig

from .limits import Limits

logger = logging.getLogger(__name__)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class LoadError(ValueError):
    """A model that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """A model that can be chosen, loaded or not.

    Attributes:
        name: unique, short; what pickers, links and endpoints say.
        source: what it was asked for by: a folder or a Hub id.
        folder: where its files lie.
        method: a key of `attention.METHODS`; "softmax" for a base.
        description: the method in one line.
        size: bytes of its weights on disk; a variant's are only what differs from its base.
        base: the entry that it was made from, None for a base.
        options: the method's options, empty for a base.
    """

    name: str
    source: str
    folder: Path
    method: str
    description: str
    size: int
    base: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        return self.base is None


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory, in evaluation mode and float32.

    Attributes:
        lock: hold it while the model runs; hooks and switched-off branches are seen by every thread.
    """

    entry: Entry
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    made_from: LoadedModel | None = None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def base(self) -> LoadedModel:
        """The model that it was made from; itself for a base."""
        return self.made_from or self

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
    """Models by name. Thread-safe; loading one does not stop others from being used.

    Attributes:
        problems: for each source that could not be used, why.
    """

    def __init__(self, sources: Iterable[str | Path] = (), limits: Limits | None = None):
        self.limits = limits or Limits()
        self.problems: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.RLock()
        for source in sources:
            try:
                self.add(str(source))
            except LoadError as error:
                logger.warning("%s", error)
                self.problems[str(source)] = str(error)

    def names(self) -> list[str]:
        """Every model that can be chosen, bases first."""
        with self._lock:
            return sorted(self._entries, key=lambda name: not self._entries[name].is_base)

    def entry(self, name: str) -> Entry:
        """What is known of a model without loading it.

        Raises:
            KeyError: if there is none of that name.
        """
        return self._entries[name]

    def loaded(self) -> list[str]:
        """The models that are in memory, least recently used first."""
        with self._lock:
            return list(self._loaded)

    def add(self, source: str) -> Entry:
        """Makes a model choosable, and its base with it; nothing is loaded.

        Raises:
            LoadError: if the source is not a model that can be used here.
        """
        folder = Path(source).expanduser()
        return self._add_folder(source, folder)

    def _add_folder(self, source: str, folder: Path) -> Entry:
        folder = folder.resolve()
        known = next((entry for entry in self._entries.values() if entry.folder == folder), None)
        if known is not None:
            return known
        config = read_config(folder)
        base = None
        if config["model_type"] == GPT2VariantConfig.model_type:
            base = self._add_folder(config["base"]["id"], folder / config["base"]["id"]).name
        options = dict(config.get("attention") or {"method": "softmax"})
        try:
            description = attention.config_from_dict(options).description
        except attention.ConfigError as error:
            raise LoadError(f"{source}: its config.json cannot be used. {error}") from None
        with self._lock:
            if len(self._entries) >= self.limits.listed_models:
                raise LoadError(f"{source}: the list is full with {len(self._entries)} models.")
            entry = Entry(
                name=self._free_name(folder.name),
                source=source,
                folder=folder,
                method=options.pop("method"),
                description=description,
                size=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                base=base,
                options=options,
            )
            self._entries[entry.name] = entry
            self._loading[entry.name] = threading.Lock()
        return entry

    def _free_name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._entries:
            count += 1
            name = f"{wanted}-{count}"
        return name

    def get(self, name: str) -> LoadedModel:
        """The model, loaded if it is not; waits while another thread loads it.

        Raises:
            KeyError: if there is none of that name.
            LoadError: if it cannot be loaded; the message says why and what to do.
        """
        entry = self.entry(name)
        base = None if entry.base is None else self.get(entry.base)
        with self._loading[name]:
            if (loaded := self._touch(name)) is not None:
                return loaded
            loaded = self._load(entry, base)
            with self._lock:
                self._loaded[name] = loaded
                self._evict()
            return loaded

    def _touch(self, name: str) -> LoadedModel | None:
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._loaded.get(name)

    @staticmethod
    def _load(entry: Entry, base: LoadedModel | None) -> LoadedModel:
        logger.info("loading %s from %s", entry.name, entry.folder)
        try:
            model, tokenizer = attention.load(entry.folder, device=DEVICE, base=None if base is None else base.model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise LoadError(f"{entry.name} cannot be loaded from {entry.source}: {error}") from error
        return LoadedModel(entry, model.eval(), tokenizer, base)

    def _evict(self) -> None:
        """Drops the least recently used models over the limit; a base stays while a variant of it is loaded."""
        needed = {loaded.entry.base for loaded in self._loaded.values()}
        for name in list(self._loaded)[:-1]:
            if len(self._loaded) <= self.limits.loaded_models:
                return
            if name not in needed:
                del self._loaded[name]


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        LoadError: if the folder holds no model of a family that the app knows.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise LoadError(f"{folder}: no model there; a model folder holds a config.json and .safetensors files.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        family = config["model_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise LoadError(f"{file}: not the config of a model ({type(error).__name__}: {error}).") from None
    families = ("gpt2", GPT2VariantConfig.model_type)
    if family not in families:
        raise LoadError(f"{folder}: a model of type {family!r}; the app shows {' and '.join(families)}.")
    return config


def bundled(folder: Path) -> list[Path]:
    """The model folders inside `folder`: plain models first, then the variants by method and name."""
    order = list(attention.METHODS)

    def key(model_folder: Path) -> tuple[int, str]:
        try:
            options = read_config(model_folder).get("attention") or {}
        except LoadError:
            return len(order), model_folder.name
        method = options.get("method", "softmax")
        return (order.index(method) if method in order else len(order)), model_folder.name

    return sorted((path.parent for path in folder.glob("*/config.json")), key=key)
