"""The models that the app can use: found at start or added later, loaded when first asked for."""

from __future__ import annotations

import logging
import os
import re
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import attention
from attention.files import expanded
from attention.hub import HUB, HubSpec
from attention.prompts import unknown_tokens

from .gpu import IS_LENT
from .limits import Limits

logger = logging.getLogger(__name__)

DEVICE = "cuda" if torch.cuda.is_available() and not IS_LENT else "cpu"

LONGEST_SOURCE = 300
SAY_NOTHING = {"variant", "model", "checkpoint", "final", "best", "last", "latest", "output"}

Progress = Callable[[int, int], None]


class LoadError(ValueError):
    """A model that cannot be used; the message says why and what to do."""


def said(error: Exception) -> str:
    """What an error says; its kind, where it says nothing."""
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class Entry:
    """A model that can be chosen, loaded or not.

    Attributes:
        name: unique, short; what pickers, links and endpoints say.
        source: what it was asked for by: a folder or a name on the Hub.
        folder: where its files lie.
        method: a key of `attention.CONFIGS`; "softmax" for a plain model.
        description: the method in one line.
        size: bytes of its weights on disk; a variant's are only what differs from its base.
        is_base: whether it is a plain model.
        base: the entry that it was made from; None for a plain model, and for a variant that needs none.
        options: the method's options, empty for a plain model.
    """

    name: str
    source: str
    folder: Path
    method: str
    description: str
    size: int
    is_base: bool
    base: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory, in evaluation mode.

    Attributes:
        base: the model that it was made from; itself for a plain model, None for a variant whose base is not known.
        lock: hold it while the model runs; hooks and switched-off branches are seen by every thread.
    """

    entry: Entry
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    made_from: LoadedModel | None = None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def base(self) -> LoadedModel | None:
        return self if self.entry.is_base else self.made_from

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def method(self) -> str:
        return self.entry.method

    @property
    def context(self) -> int:
        """Tokens that the model can hold."""
        return self.model.config.max_position_embeddings


@dataclass(frozen=True)
class Access:
    """Which models a visitor may add; whoever starts the app may name any.

    Attributes:
        repositories: names on the Hub, None for all.
        folders: local folders below which models may lie.
    """

    repositories: frozenset[str] | None = None
    folders: tuple[Path, ...] = ()

    @classmethod
    def from_environment(cls) -> Access:
        """On a Space what ALLOWED_MODELS names ("*" for any), and no folder; elsewhere the Hub and the folder
        in which the app was started."""
        if "SPACE_ID" not in os.environ:
            return cls(None, (Path.cwd(),))
        allowed = words("ALLOWED_MODELS")
        return cls(None if "*" in allowed else frozenset(allowed))

    def check(self, source: str) -> None:
        """Lets a source through.

        Raises:
            LoadError: if it may not be added.
        """
        if not isinstance(source, str) or not 0 < len(source) <= LONGEST_SOURCE or not source.isprintable():
            raise LoadError(f"Not the name of a folder or of a repository: {str(source)[:80]!r}.")
        try:
            self._check_folder(source) if is_local(source) else self._check_repository(source)
        except (OSError, RuntimeError) as error:  # no such home folder, a part of the name too long, no Hub name
            raise LoadError(str(error)) from None

    def _check_folder(self, source: str) -> None:
        folder = expanded(source).resolve()
        if not any(folder.is_relative_to(root.resolve()) for root in self.folders):
            allowed = " or ".join(f"{root}/" for root in self.folders) or "none; only the Hub's models can be added"
            raise LoadError(
                f"{source}: this folder may not be read here. Those that may lie below: {allowed}. "
                f"Whoever starts the app can name others: --checkpoints {shlex.quote(source)}."
            )

    def _check_repository(self, source: str) -> None:
        repository = HubSpec.parse(source).repo_id
        if self.repositories is not None and repository not in self.repositories:
            allowed = ", ".join(sorted(self.repositories)) or "none"
            raise LoadError(f"{repository} may not be loaded here; the owner allows: {allowed}.")


def words(variable: str) -> list[str]:
    """The words in an environment variable, quoted where they hold spaces as a shell's are; none where it is not set.

    Raises:
        ValueError: if a quotation does not end.
    """
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise ValueError(f"the environment variable {variable} cannot be read: {error}") from None


def is_local(source: str) -> bool:
    """Whether a source is a folder rather than a name on the Hub."""
    try:
        return source.startswith((".", "/", "~")) or Path(source).is_dir()
    except OSError:  # no file's name can be that long
        return False


class ModelStore:
    """Models by name. Thread-safe; loading one does not stop others from being used.

    Sources on the Hub are pulled in the background.

    Attributes:
        problems: for each source that could not be used, why.
        pulling: for each source that is being pulled, bytes done and bytes expected.
        closing: set when the app ends; what computes stops at its next step.
    """

    def __init__(
        self,
        sources: Iterable[str | Path] = (),
        limits: Limits | None = None,
        access: Access | None = None,
        hub: attention.HubOptions = HUB,
    ):
        self.limits = limits or Limits()
        self.access = access or Access.from_environment()
        self.hub = hub
        self.device = DEVICE
        self.problems: dict[str, str] = {}
        self.pulling: dict[str, tuple[int, int]] = {}
        self.closing = threading.Event()
        self._entries: dict[str, Entry] = {}
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.RLock()
        sources = [str(source) for source in sources]
        self._add_all([source for source in sources if is_local(source)])
        if remote := [source for source in sources if not is_local(source)]:
            self.pulling = dict.fromkeys(remote, (0, 0))
            threading.Thread(target=self._add_all, args=(remote,), name="pull", daemon=True).start()

    def _add_all(self, sources: list[str]) -> None:
        for source in sources:
            try:
                self._add(source)
            except LoadError as error:
                logger.warning("%s", error)
                self.problems[source] = str(error)

    def names(self) -> list[str]:
        """Every model that can be chosen, plain ones first."""
        with self._lock:
            return sorted(self._entries, key=lambda name: not self._entries[name].is_base)

    def entry(self, name: str) -> Entry:
        """What is known of a model without loading it.

        Raises:
            LoadError: if there is none of that name.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise LoadError(f"There is no model {name!r} here; there are: {', '.join(self.names())}.") from None

    def loaded(self) -> list[str]:
        """The models that are in memory, least recently used first."""
        with self._lock:
            return list(self._loaded)

    def download_size(self, source: str) -> int:
        """Bytes that adding a source would download, its base included; 0 for what is here.

        Raises:
            LoadError: if a visitor may not add it, or it does not exist.
        """
        self.access.check(source)
        with _explained(source):
            return attention.hub_size(source, self.hub)

    def add(self, source: str, progress: Progress | None = None) -> Entry:
        """Makes a model that a visitor asks for choosable, and its base with it; weights are not loaded yet.

        Raises:
            LoadError: if it may not be added, is too large, or is not a model that can be used here.
        """
        self.access.check(source)
        return self._add(source, progress, visitor=True)

    def _add(self, source: str, progress: Progress | None = None, *, visitor: bool = False) -> Entry:
        def report(done: int, total: int) -> None:
            self.pulling[source] = done, total
            if progress is not None:
                progress(done, total)

        try:
            with _explained(source):
                size = 0 if is_local(source) else attention.hub_size(source, self.hub)
                if size > self.limits.download_bytes:
                    limit = self.limits.download_bytes
                    raise LoadError(f"{source} is {size / 1e6:,.0f} MB to download; at most {limit / 1e6:,.0f} are.")
                if size:
                    logger.info("pulling %s, %.1f MB", source, size / 1e6)
                return self._register(source, attention.describe(source, self.hub, report), report, visitor)
        finally:
            self.pulling.pop(source, None)

    def _register(self, source: str, found: attention.Checkpoint, report: Progress, visitor: bool) -> Entry:
        base = None
        if found.base is not None:
            base = self._known(found.base) or self._register_base(found.base, report, visitor)
        with self._lock:
            if (known := self._known(str(found.folder))) is not None:
                return known
            if len(self._entries) >= self.limits.listed_models:
                raise LoadError(f"{source}: the list is full with {len(self._entries)} models.")
            entry = Entry(
                name=self._free_name(short_name(found.folder) if is_local(source) else source),
                source=source,
                folder=found.folder,
                method=found.method,
                description=_in_one_line(found),
                size=sum(file.stat().st_size for file in found.folder.glob("*.safetensors")),
                is_base=not found.is_variant,
                base=base and base.name,
                options=found.options,
            )
            self._entries[entry.name] = entry
            self._loading[entry.name] = threading.Lock()
        return entry

    def _register_base(self, source: str, report: Progress, visitor: bool) -> Entry:
        if visitor:
            self.access.check(source)
        return self._register(source, attention.describe(source, self.hub, report), report, visitor)

    def _known(self, source: str) -> Entry | None:
        with self._lock:
            return next((e for e in self._entries.values() if source in (e.source, str(e.folder))), None)

    def _free_name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._entries:
            count += 1
            name = f"{wanted}-{count}"
        return name

    def get(self, name: str) -> LoadedModel:
        """The model, loaded if it is not; waits while another thread loads it.

        Raises:
            LoadError: if there is none of that name, or it cannot be loaded; the message says why and what to do.
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

    def use(self, device: str) -> None:
        """Loads models onto another device from now on; those in memory are dropped."""
        with self._lock:
            if device != self.device:
                self.device = device
                self._loaded.clear()

    def _touch(self, name: str) -> LoadedModel | None:
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._loaded.get(name)

    def _load(self, entry: Entry, base: LoadedModel | None) -> LoadedModel:
        logger.info("loading %s from %s", entry.name, entry.folder)
        with _explained(entry.name):
            shared = None if base is None else base.model
            model, tokenizer = attention.load(entry.folder, device=self.device, base=shared, hub=self.hub)
        if tokenizer is None:
            raise LoadError(f"{entry.name} has no tokenizer; save it with one.")
        if unknown := unknown_tokens(tokenizer, model):
            raise LoadError(
                f"{entry.name} has no embedding for {len(unknown):,} tokens that its tokenizer knows, such as "
                f"{unknown[0]!r}; resize the model (resize_token_embeddings) and save it again."
            )
        with torch.inference_mode():
            model(torch.zeros(1, 16, dtype=torch.long, device=self.device))  # so that no timing is of a first call
        return LoadedModel(entry, model.eval(), tokenizer, base)

    def _evict(self) -> None:
        """Drops the least recently used models over the limit; a base stays while a variant of it is loaded."""
        for name in list(self._loaded)[:-1]:
            if len(self._loaded) <= self.limits.loaded_models:
                return
            if name not in {loaded.entry.base for loaded in self._loaded.values()}:
                del self._loaded[name]


def _in_one_line(found: attention.Checkpoint) -> str:
    """The method; of layers that all have the same one, though with other options, that one."""
    methods = {choice["method"] for choice in found.options.get("layers", ())}
    return attention.CONFIGS[methods.pop() if len(methods) == 1 else found.method].description


def short_name(folder: Path) -> str:
    """A folder's name, or that of the folder above where its own says nothing; a step's name with it."""
    name, above = folder.resolve().name, folder.resolve().parent.name
    if name.lower() in SAY_NOTHING and above:
        return above
    return f"{above}-{name}" if re.fullmatch(r"(checkpoint|step|epoch)?[-_]?\d+", name.lower()) and above else name


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns what can go wrong with a checkpoint into a `LoadError` that names it."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # files of strangers: what they make libraries raise has no end
        if not isinstance(error, OSError | ValueError):
            logger.debug("%s cannot be used", source, exc_info=error)
        raise LoadError(f"{source} cannot be used: {said(error)}") from error


def bundled(folder: Path) -> list[Path]:
    """The model folders inside `folder`: plain models first, then the variants by method and name."""
    order = list(attention.CONFIGS)

    def key(model_folder: Path) -> tuple[int, str]:
        try:
            method = attention.describe(model_folder).method
        except Exception:  # it is named, with what is wrong, when it is added
            return len(order), model_folder.name
        return order.index(method), model_folder.name

    return sorted((path.parent for path in folder.glob("*/config.json")), key=key)
