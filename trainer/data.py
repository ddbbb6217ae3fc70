"""Text as one stream of tokens, and blocks of it in an order that follows from the seed and the step alone."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # otherwise offline loading waits for a request

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError, DatasetsError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention.files import write_file
from attention.prompts import encode, unknown_tokens

from . import documents
from .config import DataConfig, RunConfig, StageConfig
from .documents import MARK, DataError, find_files, kinds_of, read_documents
from .names import find_names, rename
from .samples import SAMPLING, sample_texts, seeded, start_of_text

logger = logging.getLogger(__name__)
FORM = 2  # of what `_encode` gives, so that the cache holds nothing older
TEXT, TOKENS = Features({"text": Value("large_string")}), Features({"input_ids": List(Value("int32"))})


class Blocks:
    """Blocks of a stream of tokens, in an order that follows from the seed alone.

    Every pass over the text starts the blocks at another random place, wraps around at the end of the text, and takes
    the blocks in another random order: each pass shows every token at least once, all but a block's worth once.

    Args:
        tokens: (N,) the stream.
        context: tokens C of a block.
        seed: of offsets and orders.

    Raises:
        DataError: if N < C.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: Sequence[int]):
        if len(tokens) < context:
            raise DataError(f"the training text has {len(tokens)} tokens, fewer than the context of {context}")
        self.tokens, self.context, self.seed = tokens, context, tuple(seed)
        self.per_pass = -(-len(tokens) // context)
        self._pass = lru_cache(maxsize=2)(self._new_pass)

    def __getitem__(self, index: int) -> np.ndarray:
        """(C,) the index-th block, for any index ≥ 0."""
        start, order = self._pass(index // self.per_pass)
        first = (start + int(order[index % self.per_pass]) * self.context) % len(self.tokens)
        block = self.tokens[first : first + self.context]
        return np.concatenate([block, self.tokens[: self.context - len(block)]])

    def batch(self, start: int, size: int) -> Tensor:
        """(size, C) blocks `start` to `start + size − 1`."""
        blocks = np.stack([self[index] for index in range(start, start + size)])
        return torch.from_numpy(blocks.astype(np.int64))

    def _new_pass(self, number: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng((*self.seed, number))
        return int(rng.integers(len(self.tokens))), rng.permutation(self.per_pass)


class StageBatches:
    """The batches of a stage: what a step sees depends on the text, the seed, the stage and the step alone.

    Args:
        tokens: (N,) the training text.
        stage: the stage.
        seed: of the run and of the stage.

    Raises:
        DataError: if the text is shorter than a block.
    """

    def __init__(self, tokens: np.ndarray, stage: StageConfig, seed: Sequence[int]):
        self.size = stage.batch_size
        self.blocks = Blocks(tokens, stage.context, (*seed, 0))
        self.last_part = stage.steps
        if stage.final_context is not None:
            self.last_part -= round(stage.final_fraction * stage.steps)
            self.last_size = stage.batch_size * stage.context // stage.final_context
            self.last_blocks = Blocks(tokens, stage.final_context, (*seed, 1))

    def __call__(self, step: int) -> tuple[Tensor, int]:
        """The (B, T) tokens of 0-based `step`, and the index of its first block."""
        if step < self.last_part:
            first = step * self.size
            return self.blocks.batch(first, self.size), first
        first = (step - self.last_part) * self.last_size
        return self.last_blocks.batch(first, self.last_size), first


def load_tokens(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sample: Callable[[], np.ndarray],
    *,
    seed: int = 0,
    show_progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Streams of training and validation tokens, int32.

    Args:
        config: where the text comes from.
        tokenizer: with an eos token, which ends every document.
        sample: gives (N,) tokens when there is no text; see `sampled_tokens`.
        seed: of `config.rename`.
        show_progress: whether to show bars.

    Raises:
        DataError: saying what could not be found or read.
    """
    if not show_progress:
        disable_progress_bars()
    valid = None  # read first: what takes long comes after all that can be refused
    if config.valid:
        valid = read_files(config.valid, tokenizer, config)
    elif config.dataset and config.valid_split:
        valid = _read_hub(config, config.valid_split, tokenizer)
    renamed = seed if config.rename else None
    if config.train:
        train = read_files(config.train, tokenizer, config, renamed)
    elif config.dataset:
        train = _read_hub(config, config.train_split, tokenizer, renamed)
    elif config.rename:
        raise DataError(
            "data.rename exchanges the names in a text: give one with --data.train PATH, or --data.rename false"
        )
    else:
        train = sample()
    if valid is not None:
        return train, valid
    kept = _kept(len(train), config)
    return train[:-kept], train[-kept:]


def _kept(count: int, config: DataConfig) -> int:
    """How many of so many training tokens are kept for validation where there is no other text for it."""
    return max(2, int(count * config.valid_fraction))


def load_test_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, np.ndarray] | None:
    """Name and tokens of the text to measure on at the end, if the config has one.

    Raises:
        DataError: if it cannot be read.
    """
    data = config.data
    if config.eval.text is not None:
        return Path(config.eval.text).name, read_files([config.eval.text], tokenizer, data)
    if data.test_split is not None:
        return f"{data.dataset} {data.test_split}", _read_hub(data, data.test_split, tokenizer)
    return None


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a document.

    Raises:
        DataError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token to end documents with: name one (eos_token) and save it")
    return tokenizer.eos_token_id


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Checks that a model has a place for every token.

    Raises:
        DataError: naming tokens that it has not.
    """
    if unknown := unknown_tokens(tokenizer, model):
        names = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"the tokenizer knows {len(unknown):,} tokens for which the model has no embedding: {names}. Take the "
            "model's own tokenizer, or resize the model (resize_token_embeddings) and save it"
        )


def check_length(count: int, stages: Sequence[StageConfig]) -> None:
    """Checks that a training text of so many tokens fills a block of every stage.

    Raises:
        DataError: naming all contexts that are longer.
    """
    contexts = {
        f"stages.{place}.{name}": getattr(stage, name)
        for place, stage in enumerate(stages)
        for name in ("context", "final_context")
    }
    if long := [f"{name} is {value}" for name, value in contexts.items() if value is not None and value > count]:
        raise DataError(
            f"the training text has {count:,} tokens, but {', '.join(long)}: give more text, or shorter contexts"
        )


def read_files(
    patterns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    renamed: int | None = None,
) -> np.ndarray:
    """(N,) int32 tokens of local files, tokenised once and cached by `datasets`; see `documents` for what is read.

    By default a text file's documents end at an empty line, and paragraphs, one a line, keep their newlines. With
    `renamed`, a seed, names are exchanged.

    Raises:
        DataError: naming patterns that match nothing, mixed kinds, empty text, missing columns.
    """
    config = config or DataConfig()
    files = find_files(patterns)
    joined = kinds_of(files) != {"text"} and config.documents == "document"
    source = ", ".join(patterns)
    with _cached(source):
        try:
            rows = Dataset.from_generator(_Rows(files, config), features=TEXT)
        except ValueError:  # what `datasets` says to no rows
            raise DataError(f"{source} holds no text, or is empty") from None
    return _tokenise(rows, "text", tokenizer, joined, source, renamed)


class _Rows:
    """The documents of files, a row each, as `datasets` calls for them.

    It caches them under the hash of their pickled source, which is a key here that follows from the content: files may
    move. (To be told a key, as `fingerprint`, is new in datasets 4.3.)
    """

    def __init__(self, files: list[Path], config: DataConfig):
        self.files, self.column, self.form = files, config.column, config.documents
        self.key = _key(_digest([Path(documents.__file__), *files]), self.column, self.form)

    def __call__(self) -> Iterator[dict[str, str]]:
        return ({"text": text} for file in self.files for text in read_documents(file, self.column, self.form))

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.key,)


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 over the content of files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _cached(source: str) -> Iterator[None]:
    """Says what `datasets` says in its own way while it reads a text into its cache.

    Raises:
        DataError: for a text that cannot be read, and a cache that cannot be written.
    """
    try:
        yield
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    except (OSError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(
            f"{source} cannot be tokenised into the cache, {datasets_config.HF_DATASETS_CACHE}: {cause}. Another "
            "place for it is what the environment variable HF_HOME names"
        ) from error


def _read_hub(
    config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, renamed: int | None = None
) -> np.ndarray:
    name = f"{config.dataset} {config.name or ''}".strip()
    try:
        rows = load_dataset(config.dataset, config.name, split=split, revision=config.revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"the data set {name}, split {split}, cannot be loaded: {error}. Check the name, the network and the cache "
            "(HF_HOME), or give local files with --data.train PATH --data.dataset null"
        ) from error
    if config.column not in rows.column_names:
        raise DataError(f"{name} has no field {config.column!r}; it has {rows.column_names}. Set data.column")
    kind = rows.features[config.column]
    if not isinstance(kind, Value) or "string" not in kind.dtype:
        raise DataError(f"the field {config.column!r} of {name} is {kind}, not text. Set data.column")
    rows = rows.select_columns(config.column)
    return _tokenise(rows, config.column, tokenizer, config.documents == "document", name, renamed)


def _tokenise(
    rows: Dataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    joined: bool,
    source: str,
    renamed: int | None,
) -> np.ndarray:
    eos = end_of_text(tokenizer)
    if empty := rows.data.column(column).null_count:
        logger.warning("%s: %d of %d rows have no text and are left out", source, empty, len(rows))
    if joined:
        rows = Dataset.from_dict({column: ["".join(text for text in rows[column] if text)]})
    with _cached(source):
        if renamed is not None:
            rows = _rename(rows, column, renamed, source)
        rows = rows.map(
            lambda batch: {"input_ids": _encode(batch[column], tokenizer)},
            batched=True,
            batch_size=256,
            remove_columns=rows.column_names,
            features=TOKENS,
            new_fingerprint=_key(rows._fingerprint, column, _identity(tokenizer), eos, FORM),
            desc=f"Tokenising {source}",
        )
    chunks = [chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks]
    tokens = np.concatenate([np.zeros(0, np.int32), *chunks])
    if len(tokens) < 2:
        raise DataError(f"{source} holds no text, or is empty")
    return tokens


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart: all of one in the library's form, or the files of one in Python."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _digest(sorted(path for path in Path(folder).rglob("*") if path.is_file()))


def _rename(rows: Dataset, column: str, seed: int, source: str) -> Dataset:
    names = cache(lambda: find_names(text for text in rows[column] if text))  # not looked for if the result is cached
    return rows.map(
        lambda row, index: {column: rename(row[column] or "", names(), (seed, index))},
        with_indices=True,
        new_fingerprint=_key(rows._fingerprint, column, "renamed", seed),
        desc=f"Renaming in {source}",
    )


def _encode(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each text, with eos after it; none for one that is nothing but blanks."""
    encoded: list[list[int]] = [[] for _ in texts]
    bare = [(text or "").removeprefix(MARK) for text in texts]
    held = {place: text for place, text in enumerate(bare) if text and not text.isspace()}
    if held:
        for place, ids in zip(held, encode(tokenizer, [*held.values()], add_special_tokens=False), strict=True):
            encoded[place] = [*ids, tokenizer.eos_token_id]
    return encoded


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def check_sample(config: RunConfig) -> None:
    """Checks that the text that a base is asked to write will be long enough, before it writes.

    Raises:
        DataError: naming what is too long for it.
    """
    texts = _texts_in_all(config.data.sampled_tokens, sampled_length(config), config.data.sample_batch)
    count = texts * sampled_length(config)
    check_length(count if config.data.valid else count - _kept(count, config.data), config.stages)


def sampled_length(config: RunConfig) -> int:
    """Tokens of each text that the base writes for a run."""
    return max(stage.context for stage in config.stages)


def _texts_in_all(count: int, length: int, batch_size: int) -> int:
    """Texts of `length` tokens that make up `count`, in whole batches."""
    return -(-count // (batch_size * length)) * batch_size


def sampled_tokens(
    base: PreTrainedModel,
    base_hash: str,
    count: int,
    *,
    length: int,
    batch_size: int,
    seed: int,
    cache: str | Path,
    start: int | None = None,
    show_progress: bool = True,
) -> np.ndarray:
    """Text that the base writes: (≥ count,) int32 tokens, in texts of `length` tokens that start with eos.

    Sampled at temperature 1 from the whole distribution; texts go on after an eos. Generated once, then read from
    `cache`, where a file's name follows from everything that its content depends on.

    Args:
        base: in evaluation mode; `length` ≤ its number of positions.
        base_hash: identifies the base's weights.
        seed: of the sampling; the global random state is left as it was.
        start: the eos token; the model's own by default.

    Raises:
        DataError: if the cache cannot be written, which is found out before anything is sampled.
    """
    start = start_of_text(base) if start is None else start
    path = Path(cache) / f"sampled-{_key(SAMPLING, base_hash, count, length, batch_size, seed, start)}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["tokens"]
        except SafetensorError as error:
            logger.warning("%s is damaged and will be made anew: %s", path, error)
    texts = _texts_in_all(count, length, batch_size)
    with _writable(path):
        write_file(path.with_name(f"{path.name}.try"), bytes(4 * texts * length)).unlink()
    batches = []
    bar = tqdm(total=texts * length, unit="tok", desc="Sampling text from the base", disable=not show_progress)
    with seeded(seed, base.device), bar:
        for _ in range(texts // batch_size):
            batches.append(sample_texts(base, batch_size, length, start).cpu().numpy().astype(np.int32))
            bar.update(batches[-1].size)
    tokens = np.concatenate(batches).reshape(-1)
    with _writable(path):
        write_file(path, save({"tokens": tokens}))
    return tokens


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"sampled text is kept in {path.parent}, which cannot be written: {error}. Name another folder with "
            "--data.cache PATH"
        ) from error
