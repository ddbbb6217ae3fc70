"""Prompts into tokens and tokens into the text that is shown."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from attention.prompts import decode, prompt_tokens

MOST_BYTES = 4  # of a character; tokens that are not one by then will be none


class PromptError(ValueError):
    """A prompt that cannot be continued; the message is for the person who wrote it."""


def clean(text: str) -> str:
    """Text that can be encoded: lone surrogates, which no encoding has, become U+FFFD; all else stays."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's token ids.

    Raises:
        PromptError: if the prompt is empty, or the tokenizer cannot read it.
    """
    try:
        ids = prompt_tokens(tokenizer, clean(prompt))
    except ValueError as error:
        raise PromptError(f"The prompt cannot be read: {error}") from error
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
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False) if tokenizer.is_fast else None
        self._last: list[int] = []  # the tokens of the last piece of text, and those that none was given for yet
        self._given = 0  # how many of them are the former

    def next(self, token_id: int) -> str:
        """The text that a token adds to those before it."""
        if self._stream is not None:
            return self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        self._last.append(token_id)
        before, now = map(self._decode, (self._last[: self._given], self._last))
        begun = now.endswith("\ufffd") and len(self._last) - self._given < MOST_BYTES
        if begun or len(now) <= len(before):
            return ""
        self._last, self._given = self._last[self._given :], len(self._last) - self._given
        return now[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, clean_up_tokenization_spaces=False)


def token_label(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token on its own, as a label; bytes that are no whole character show as U+FFFD."""
    return decode(tokenizer, [token_id])
