"""Prompts into tokens and tokens into the text that is shown."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class PromptError(ValueError):
    """A prompt that cannot be continued; the message is for the person who wrote it."""


def clean(text: str) -> str:
    """Text that can be encoded: lone surrogates, which no encoding has, become U+FFFD; all else stays."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's token ids.

    Raises:
        PromptError: if the prompt is empty.
    """
    ids = tokenizer(clean(prompt), verbose=False)["input_ids"]
    if not ids:
        raise PromptError("The prompt is empty: write a few words for the models to continue.")
    return ids


def room_for_prompt(context: int, new_tokens: int) -> int:
    """How many tokens of a prompt are read: what the new ones leave of the context, and at least half of it."""
    return max(context - new_tokens, context // 2, 1)


class TokenTexts:
    """The text of each token in turn; joined, they are the text of all.

    A character that several tokens make up is given to the last of them, and the others are empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def next(self, token_id: int) -> str:
        return self._stream.step(self._tokenizer, token_id) or ""


def token_label(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token on its own, as a label; bytes that are no whole character show as U+FFFD."""
    return tokenizer.decode([token_id])
