"""Text as one stream of tokens, and blocks of it in an order that follows from the seed and the step alone."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # otherwise offline loading waits for a request

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DataConfig, RunConfig, StageConfig
from .names import find_names, rename
from .samples import sample_texts, seeded

logger = logging.getLogger(__name__)
JSON_SUFFIXES = (".json", ".jsonl")


class DataError(Exception):
    """Data that cannot be used; the message says what to do."""


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
    if config.valid:
        return train, read_files(config.valid, tokenizer, config)
    if config.dataset and config.valid_split:
        return train, _read_hub(config, config.valid_split, tokenizer)
    kept = max(2, int(len(train) * config.valid_fraction))
    return train[:-kept], train[-kept:]


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


def read_files(
    patterns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    renamed: int | None = None,
) -> np.ndarray:
    """(N,) int32 tokens of text files or JSON lines, tokenised once and cached by `datasets`.

    By default a text file's documents end at an empty line, and paragraphs, one a line, keep their newlines. With
    `renamed`, a seed, names are exchanged.

    Raises:
        DataError: naming patterns that match nothing, mixed kinds, empty text, missing columns.
    """
    config = config or DataConfig()
    files = _find(patterns)
    kinds = {"json" if Path(file).suffix in JSON_SUFFIXES else "text" for file in files}
    if len(kinds) > 1:
        raise DataError(f"text files and JSON lines cannot be mixed in one list: {', '.join(patterns)}")
    options = {"sample_by": config.documents or "paragraph"} if kinds == {"text"} else {}
    try:
        rows = load_dataset(kinds.pop(), data_files=files, split="train", **options)
    except Exception as error:  # datasets wraps whatever went wrong while reading in its own classes
        raise DataError(
            f"{', '.join(patterns)} cannot be read as text, or is empty: {error.__cause__ or error}"
        ) from error
    column = "text" if options else config.column
    joined = not options and config.documents == "document"
    return _tokenise(rows, column, tokenizer, joined, ", ".join(patterns), renamed)


def _find(patterns: list[str]) -> list[str]:
    found = {pattern: sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))) for pattern in patterns}
    if missing := [pattern for pattern, files in found.items() if not files]:
        raise DataError(f"no file matches {', '.join(missing)} (looked in {Path.cwd()})")
    return [file for files in found.values() for file in files]


def _read_hub(
    config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, renamed: int | None = None
) -> np.ndarray:
    name = f"{config.dataset} {config.name or ''}".strip()
    try:
        rows = load_dataset(config.dataset, config.name, split=split, revision=config.revision)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the data set {name}, split {split}, cannot be loaded: {error}. "
            "Check the name and the network, or give local files with --data.train PATH --data.dataset null"
        ) from error
    return _tokenise(rows, config.column, tokenizer, config.documents == "document", name, renamed)


def _tokenise(
    rows: Dataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    joined: bool,
    source: str,
    renamed: int | None,
) -> np.ndarray:
    if column not in rows.column_names:
        raise DataError(f"{source} has no field {column!r}; it has {rows.column_names}. Set data.column")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token to end documents with")
    if joined:
        rows = Dataset.from_dict({column: ["".join(rows[column])]})
    if renamed is not None:
        rows = _rename(rows, column, renamed, source)
    rows = rows.map(
        lambda batch: {"input_ids": _encode(batch[column], tokenizer)},
        batched=True,
        batch_size=256,
        remove_columns=rows.column_names,
        new_fingerprint=_key(rows._fingerprint, column, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id),
        desc=f"Tokenising {source}",
    )
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in rows.data.column("input_ids").chunks]
    tokens = np.concatenate(chunks or [np.zeros(0)]).astype(np.int32, copy=False)
    if len(tokens) < 2:
        raise DataError(f"{source} holds no text")
    return tokens


def _rename(rows: Dataset, column: str, seed: int, source: str) -> Dataset:
    names = cache(lambda: find_names(text for text in rows[column] if text))  # not looked for if the result is cached
    return rows.map(
        lambda row, index: {column: rename(row[column] or "", names(), (seed, index))},
        with_indices=True,
        new_fingerprint=_key(rows._fingerprint, column, "renamed", seed),
        desc=f"Renaming in {source}",
    )


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each text that is not empty, with eos after it."""
    texts = [text for text in texts if text]
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def sampled_tokens(
    base: PreTrainedModel,
    base_hash: str,
    count: int,
    *,
    length: int,
    batch_size: int,
    seed: int,
    cache: str | Path,
    show_progress: bool = True,
) -> np.ndarray:
    """Text that the base writes: (≥ count,) int32 tokens, in texts of `length` tokens that start with eos.

    Sampled at temperature 1 from the whole distribution; texts go on after an eos. Generated once, then read from
    `cache`, where a file's name follows from everything that its content depends on.

    Args:
        base: in evaluation mode; `length` ≤ its number of positions.
        base_hash: identifies the base's weights.
        seed: of the sampling; the global random state is left as it was.
    """
    eos = base.config.eos_token_id
    path = Path(cache) / f"sampled-{_key(base_hash, count, length, batch_size, seed, eos)}.safetensors"
    if path.is_file():
        return load_file(path)["tokens"]
    batches = []
    bar = tqdm(total=count, unit="tok", desc="Sampling text from the base", disable=not show_progress)
    with seeded(seed, base.device), bar:
        while len(batches) * batch_size * length < count:
            batches.append(sample_texts(base, batch_size, length).cpu().numpy().astype(np.int32))
            bar.update(batches[-1].size)
    tokens = np.concatenate(batches).reshape(-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"tokens": tokens}, partial)
    partial.replace(path)
    return tokens
