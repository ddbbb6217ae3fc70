"""What a base expects of a text, stored once: its likeliest tokens, and the mass of all others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from transformers import PreTrainedModel

from .losses import TopTokens, chunk_size, last_hidden, output_matrix

logger = logging.getLogger(__name__)
UNIT = 2.0**-11  # nats, of stored log-probabilities, which reach down to −32: an error of at most 0.025 % in each
K_STEP = 16  # k is a multiple of it
BUFFERED_TOKENS = 16_384  # of a file
CHOICE = "choice.json"


@dataclass
class TeacherCache:
    """The k likeliest next tokens after each token, for sequences that may come again, in a folder of safetensors.

    A sequence is found by its tokens alone, so any fit to the same base that reads it is served, in any order of
    sequences. What was computed just now is also given as it is stored, so that a run does not depend on what it finds.

    Attributes:
        folder: for this base alone.
        base: computes what is missing.
        k: how many tokens.
        found, computed: sequences so far that were there, and that were not.
    """

    folder: Path
    base: PreTrainedModel
    k: int
    found: int = 0
    computed: int = 0
    _places: dict[bytes, tuple[Path, int]] = field(default_factory=dict)
    _fresh: dict[bytes, dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __call__(self, input_ids: Tensor) -> TopTokens:
        """What the base expects after all tokens but the last of (B, T) sequences, in B · (T − 1) rows."""
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in input_ids.cpu().numpy()]
        rows = [self._read(key) for key in keys]
        if None in rows:  # then all at once, so that the same batch always gives the same bits
            rows = list(self._compute(input_ids))
            self._fresh |= dict(zip(keys, rows, strict=True))
            self.computed += len(rows)
            if len(self._fresh) * input_ids.shape[1] >= BUFFERED_TOKENS:
                self.store()
        else:
            self.found += len(rows)
        return decoded({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, input_ids.device)

    def store(self) -> None:
        """Writes what is not in the folder yet; where that fails, the run goes on, and the log says why."""
        lengths = {len(row["rest"]) for row in self._fresh.values()}
        for length in lengths:
            rows = {key: row for key, row in self._fresh.items() if len(row["rest"]) == length}
            arrays = {name: np.stack([row[name] for row in rows.values()]) for name in ("tokens", "probs", "rest")}
            arrays["keys"] = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
            path = self.folder / f"{hashlib.sha256(arrays['keys'].tobytes()).hexdigest()[:16]}.safetensors"
            try:
                _write(path, save(arrays))
            except OSError as error:
                logger.warning("%s cannot be written, so what the base expects is not kept: %s", path, error)
                continue
            self._index(path)
        self._fresh.clear()

    def describe(self) -> str:
        """How much was there, for the log."""
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return (
            f"of {self.found + self.computed:,} sequences, {self.found:,} were in {self.folder} "
            f"({size / 2**20:,.0f} MiB, {self.k} tokens a place)"
        )

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "np") as file:
                keys = file.get_tensor("keys")
        except (OSError, SafetensorError) as error:
            logger.warning("%s is skipped, and what it held computed again: %s", path, error)
            return
        self._places |= {key.tobytes(): (path, row) for row, key in enumerate(keys)}

    def _read(self, key: bytes) -> dict[str, np.ndarray] | None:
        if key in self._fresh:
            return self._fresh[key]
        if key not in self._places:
            return None
        path, row = self._places[key]
        try:
            with safe_open(path, "np") as file:
                return {name: file.get_slice(name)[row] for name in ("tokens", "probs", "rest")}
        except (OSError, SafetensorError) as error:
            logger.warning("%s is gone, and what it held computed again: %s", path, error)
            self._places = {other: place for other, place in self._places.items() if place[0] != path}
            return None

    def _compute(self, input_ids: Tensor) -> Iterator[dict[str, np.ndarray]]:
        """A row for each sequence, as it is stored."""
        vocabulary = self.base.config.vocab_size
        parts = [encoded(top, vocabulary) for top in _expected(self.base, input_ids, self.k)]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        split = {name: np.split(array, len(input_ids)) for name, array in arrays.items()}
        yield from ({name: split[name][row] for name in split} for row in range(len(input_ids)))


def open_cache(folder: Path, base: PreTrainedModel, text: np.ndarray, error: float) -> TeacherCache:
    """The cache in a folder, which is made with the fewest tokens k that keep `error`, if it is not there.

    With the tokens outside the k likeliest as a single event, KL(base ‖ variant) loses what the two differ in there:
    the mean of r · KL(base ‖ variant | one of these), with r their mass (the chain rule of relative entropy). Where
    variant and base are as close on the rest as elsewhere, this is a share of the whole of about the mean of r, which
    is what `error` bounds. `benchmarks/teacher.py` prints the share that is really lost.

    Args:
        text: (N,) tokens to measure r on.

    Raises:
        ValueError: if that would take more than half of the vocabulary.
    """
    choice = folder / CHOICE
    if not choice.is_file():
        rest = rest_mass(base, text)
        k = K_STEP * (1 + int(np.argmax(rest[K_STEP - 1 :: K_STEP] <= error)))
        if 2 * k > len(rest) or rest[k - 1] > error:
            raise ValueError(
                f"data.teacher_error: {error:g} would need more than half of the {len(rest)} tokens of the vocabulary "
                "at each place; allow more, or leave out data.teacher_cache"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write(choice, json.dumps({"k": k, "mean_rest": float(rest[k - 1])}).encode())
    return TeacherCache(folder, base, json.loads(choice.read_text(encoding="utf-8"))["k"])


@torch.no_grad()
def rest_mass(base: PreTrainedModel, text: np.ndarray, blocks: int = 8, length: int = 512) -> np.ndarray:
    """(V,) mean mass, in blocks from all over a text (N,), of all but the 1, 2, ... likeliest tokens."""
    length = min(length, len(text), base.config.max_position_embeddings)
    starts = np.linspace(0, len(text) - length, blocks).astype(int)
    sums, count = 0.0, 0
    for start in starts:
        ids = torch.from_numpy(text[start : start + length].astype(np.int64))[None].to(base.device)
        probs = (last_hidden(base, ids)[0] @ output_matrix(base).t()).float().softmax(-1)
        sums = sums + probs.sort(-1, descending=True).values.sum(0).double()
        count += length
    return (1 - sums.cumsum(0) / count).clamp_min(0).cpu().numpy()


@torch.no_grad()
def _expected(base: PreTrainedModel, input_ids: Tensor, k: int) -> Iterator[TopTokens]:
    """What a base expects in (B, T) sequences, as many rows of B · (T − 1) at a time as suit the device."""
    weight = output_matrix(base)
    for hidden in last_hidden(base, input_ids)[:, :-1].flatten(0, 1).split(chunk_size(weight)):
        log_probs = (hidden @ weight.t()).float().log_softmax(-1)
        top = log_probs.topk(k)
        yield TopTokens(top.indices, top.values, log_probs.scatter_(1, top.indices, -torch.inf).logsumexp(-1))


def encoded(top: TopTokens, vocabulary: int) -> dict[str, np.ndarray]:
    """Arrays to store: tokens in 2 bytes where the vocabulary allows, log-probabilities in 2, in units of `UNIT`."""
    return {
        "tokens": top.tokens.cpu().numpy().astype(np.uint16 if vocabulary <= 2**16 else np.int32),
        "probs": _units(top.log_probs),
        "rest": _units(top.log_rest),
    }


def _units(log_probs: Tensor) -> np.ndarray:
    return (-log_probs / UNIT).round().clamp(0, 2**16 - 1).cpu().numpy().astype(np.uint16)


def decoded(arrays: dict[str, np.ndarray], device: torch.device) -> TopTokens:
    """What `encoded` stored, scaled so that the probabilities and the rest have sum 1."""
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64)).to(device)
    log_probs, log_rest = (
        torch.from_numpy(arrays[name].astype(np.float32)).to(device).mul_(-UNIT) for name in ("probs", "rest")
    )
    total = torch.logaddexp(log_probs.logsumexp(-1), log_rest)
    return TopTokens(tokens, log_probs - total[:, None], log_rest - total)


def _write(path: Path, content: bytes) -> None:
    """A file that is complete or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
