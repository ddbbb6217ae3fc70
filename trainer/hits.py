"""Which tokens of a text must be looked up in it.

A *hit* of associative recall is a token that ends a pair of tokens which its block has had before, and which is rare in
general (an "AR hit", Arora et al. 2023, arXiv 2312.04927). Weights know what follows what as a rule; what a name or a
place of this text goes with, only a look at the text can tell. The hit's distance is the number of tokens back to the
end of the latest earlier occurrence of its pair. A pair is *rare* if it was seen at most 20 times in a million tokens,
so at most 60 times in 3 million (in the paper, at most 1,250 times in the whole training).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase

import attention
from attention.files import PAIRS

RARE = 20  # occurrences in a million tokens up to which a pair is rare


def most_rare(tokens: Any) -> Any:
    """How often a pair that is rare comes at most in so many tokens, a number or an array of numbers."""
    return RARE * tokens // 1_000_000


@dataclass(frozen=True)
class PairTable:
    """The pairs that were seen too often in a text to be rare.

    Attributes:
        codes: (N,) int64 their codes, ascending; see `pair_codes`.
        tokens: how many tokens of the text were read.
        source: the text's name.
    """

    codes: np.ndarray
    tokens: int
    source: str

    @property
    def at_most(self) -> int:
        """How often a pair was seen at most that is rare."""
        return most_rare(self.tokens)

    def rare(self, codes: np.ndarray) -> np.ndarray:
        """(N,) whether each of the pairs with codes (N,) is rare; one that was never seen is."""
        if not len(self.codes):
            return np.ones(len(codes), bool)
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        return self.codes[places] != codes


def pair_codes(tokens: np.ndarray) -> np.ndarray:
    """(N − 1,) int64 for tokens (N,): a number for each two tokens that follow each other."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] << 32 | tokens[1:]


def count_pairs(tokens: np.ndarray, source: str) -> PairTable:
    """The table of a text (N,).

    Raises:
        ValueError: if the text is so short that no pair in it would be rare.
    """
    if not most_rare(len(tokens)):
        raise ValueError(f"{source} has {len(tokens):,} tokens; at least {1_000_000 // RARE:,} show what is rare")
    codes, counts = np.unique(pair_codes(tokens), return_counts=True)
    return PairTable(codes[counts > most_rare(len(tokens))], len(tokens), source)


def hit_distances(token_ids: Sequence[int] | np.ndarray, table: PairTable, context: int | None = None) -> np.ndarray:
    """How far back each token of a text can be looked up, if it is a hit.

    Args:
        token_ids: (N,) the text.
        table: says which pairs are rare; its tokenizer must be the one that made the ids.
        context: blocks are so many tokens long; None: the text is one block.

    Returns:
        (N,) int64: tokens back to where the pair that each token ends was completed before in its block; 0 for a token
        that is no hit.
    """
    tokens = np.asarray(token_ids)
    distances = repeat_distances(tokens, context or max(1, len(tokens)))
    distances[1:][~table.rare(pair_codes(tokens))] = 0
    return distances


def hit_distances_without_table(tokens: np.ndarray, context: int) -> np.ndarray:
    """`hit_distances` of a text (N,) for which a pair is rare if it is so in the text's other blocks."""
    distances = repeat_distances(tokens, context)
    codes, place = pair_codes(tokens), np.arange(1, len(tokens))
    inside = place % context != 0
    block, which = place[inside] // context, np.unique(codes[inside], return_inverse=True)[1]
    both, of_both, in_block = np.unique(np.stack([block, which]), axis=1, return_inverse=True, return_counts=True)
    elsewhere = np.bincount(which)[both[1]] - in_block
    others = len(tokens) - np.bincount(np.arange(len(tokens)) // context)[both[0]]
    common = elsewhere > most_rare(others)
    distances[1:][inside] *= ~common[of_both.reshape(-1)]
    return distances


def repeat_distances(tokens: np.ndarray, context: int) -> np.ndarray:
    """(N,) int64 for tokens (N,): `hit_distances` as if all pairs were rare."""
    distances = np.zeros(len(tokens), np.int64)
    place = np.arange(1, len(tokens))
    place = place[place % context != 0]  # a block's first token ends no pair of the block
    block, codes = place // context, pair_codes(tokens)[place - 1]
    order = np.lexsort((place, codes, block))
    place, block, codes = place[order], block[order], codes[order]
    again = (codes[1:] == codes[:-1]) & (block[1:] == block[:-1])
    distances[place[1:][again]] = (place[1:] - place[:-1])[again]
    return distances


def save_pairs(table: PairTable, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a table; it is complete or not there."""
    pairs = np.stack([table.codes >> 32, table.codes & 0xFFFFFFFF], 1).astype(np.int32)
    about = {"tokens": str(table.tokens), "text": table.source, "tokenizer": _vocabulary_hash(tokenizer)}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(save({"pairs": pairs}, metadata=about))
    partial.replace(path)


def load_pairs(path: Path, tokenizer: PreTrainedTokenizerBase) -> PairTable:
    """Reads a table.

    Raises:
        ValueError: if the file is none, or was made with another tokenizer.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            pairs, about = file.get_tensor("pairs").astype(np.int64), file.metadata()
        table = PairTable(np.unique(pairs[:, 0] << 32 | pairs[:, 1]), int(about["tokens"]), about["text"])
        made_with = about["tokenizer"]
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of pairs ({error}); make it anew with python -m trainer.pairs, or delete it"
        ) from error
    if made_with != _vocabulary_hash(tokenizer):
        raise ValueError(
            f"{path} was made with another tokenizer than the base's; make it anew with python -m trainer.pairs"
        )
    return table


def find_pairs(base: str | Path, tokenizer: PreTrainedTokenizerBase) -> PairTable | None:
    """The table that lies with a base; None where there is none.

    Args:
        base: what `attention.load` takes.

    Raises:
        attention.CheckpointError: if there is no such base.
        ValueError: see `load_pairs`.
    """
    path = attention.locate(base) / PAIRS
    return load_pairs(path, tokenizer) if path.is_file() else None


def distances_in(
    tokens: np.ndarray,
    base: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    pairs: str | Path | None = None,
) -> tuple[np.ndarray, str]:
    """The hits of a text that is read in blocks, by the base's table or else by the text's other blocks.

    Args:
        tokens: (N,) the text.
        base: what `attention.load` takes.
        context: tokens of a block.
        pairs: a table in place of that which lies with the base.

    Returns:
        (N,) their distances, 0 for what is no hit; and a sentence on what was taken as rare.

    Raises:
        attention.CheckpointError, ValueError: see `find_pairs`.
    """
    table = find_pairs(base, tokenizer) if pairs is None else load_pairs(pairs, tokenizer)
    if table is not None:
        rare = f"it comes at most {table.at_most} times in {table.tokens:,} tokens of {table.source}"
        return hit_distances(tokens, table, context), rare
    rare = f"it comes at most {RARE} times in a million tokens of the text's other blocks (the base has no {PAIRS})"
    return hit_distances_without_table(tokens, context), rare


def _vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    listed = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
