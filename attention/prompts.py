"""What a tokenizer makes of a prompt, and whether a model knows all of its tokens."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = "a"  # any text that is no special token


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that is to be continued.

    What the tokenizer's template puts before a text, such as bos or [CLS], is there; what it puts after one, such as
    eos or [SEP], is not, as it says that the text is over.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - _closing(tokenizer)]


def _closing(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the template puts after a text."""
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBE)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    return len(whole) - starts[0] - len(bare) if starts else 0


def unknown_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """The tokens that a model has no embedding for, in the order of their numbers."""
    size = model.get_input_embeddings().weight.shape[0]
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= size}
    return [beyond[index] for index in sorted(beyond)]
