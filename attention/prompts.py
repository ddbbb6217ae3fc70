"""What a tokenizer makes of a prompt and of what a model writes, and whether the model knows all of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = "a"  # any text that is no special token


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that is to be continued.

    What the tokenizer's template puts before a text, such as bos or [CLS], is there; what it puts after one, such as
    eos or [SEP], is not, as it says that the text is over.

    Raises:
        ValueError: if the tokenizer cannot read the text.
    """
    (ids,) = encode(tokenizer, [text])
    return ids[: len(ids) - _closing(tokenizer, text)]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[list[int]]:
    """The tokens of each text, as the tokenizer gives them under its options.

    Raises:
        ValueError: if the tokenizer cannot read one of them, as one that has no token for what it does not know.
    """
    try:
        return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    except Exception as error:  # the library's are of no class of their own; one in Python raises what it likes
        raise ValueError(f"the tokenizer, a {type(tokenizer).__name__}, cannot read the text: {error}") from error


def _closing(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How many tokens the template puts after a text; told by another one, as this may hold any tokens itself."""
    try:
        (whole,), probe = encode(tokenizer, [PROBE]), PROBE
    except ValueError:  # some know a few words and nothing else
        (whole,), probe = encode(tokenizer, [text]), text
    (bare,) = encode(tokenizer, [probe], add_special_tokens=False)
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    return len(whole) - starts[0] - len(bare) if starts else 0


def unknown_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """The tokens that a model has no embedding for, in the order of their numbers."""
    size = model.get_input_embeddings().weight.shape[0]
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= size}
    return [beyond[index] for index in sorted(beyond)]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], **options: Any) -> str:
    """The text of tokens; U+FFFD for those that a tokenizer in Python refuses, as a model may have more than it has."""
    try:
        return tokenizer.decode(token_ids, **options)
    except Exception:  # in Python, what such a token leads to is anything
        known = set(tokenizer.get_vocab().values())
        runs = groupby(map(int, token_ids), known.__contains__)
        return "".join(tokenizer.decode([*run], **options) if whole else "\ufffd" * len([*run]) for whole, run in runs)
