"""Texts that models write: from fixed prompts to be read, and many at once to be counted and judged by the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from attention.prompts import decode, prompt_tokens
from attention.variant import position_limit

from .config import SampleConfig
from .losses import last_hidden, output_matrix, vocabulary_loss
from .names import INSIDE, NAME

BATCH = 16  # texts written at a time
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # from the whole distribution
SETTLED = 50  # tokens after which a text that keeps to its matter brings few new names


@torch.no_grad()
def write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SampleConfig, seed: int
) -> list[str]:
    """Continues each prompt, up to eos; the global random state is left as it was.

    Args:
        seed: the same for each prompt.
    """
    limit, end = position_limit(model), tokenizer.eos_token_id
    training = model.training
    model.eval()
    texts = []
    for prompt in options.prompts:
        input_ids = prompt_ids(tokenizer, prompt)
        length = options.length if limit is None else min(options.length, limit - input_ids.shape[1])
        with seeded(seed, model.device):
            output = continue_texts(model, input_ids, length, temperature=options.temperature, end=end)
        texts.append(decode(tokenizer, output[0, input_ids.shape[1] :], skip_special_tokens=True))
    model.train(training)
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """(1, T ≥ 1) token ids; an empty prompt is the beginning of a document. See `prompt_tokens`."""
    return torch.tensor([prompt_tokens(tokenizer, prompt) or [tokenizer.eos_token_id]])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed inside the block; outside, as if it were not there."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def sample_texts(model: PreTrainedModel, count: int, length: int, start: int | None = None) -> Tensor:
    """(count, length) tokens that a model in evaluation mode writes from eos on, at temperature 1.

    Sampled from the whole distribution; a text goes on after an eos inside it.

    Args:
        start: the eos token; the model's own by default.

    Raises:
        ValueError: if it is not given and the model's config does not say which it is.
    """
    first = start_of_text(model) if start is None else start
    return continue_texts(model, torch.full((count, 1), first), length - 1)


def start_of_text(model: PreTrainedModel) -> int:
    """The eos token that a model's config names.

    Raises:
        ValueError: if that is none, several, or no token of the model.
    """
    eos, size = model.config.eos_token_id, model.get_input_embeddings().weight.shape[0]
    if not isinstance(eos, int) or not 0 <= eos < size:
        raise ValueError(f"the model's eos_token_id is {eos}, which is not one of its {size:,} tokens")
    return eos


@torch.no_grad()
def continue_texts(
    model: PreTrainedModel, prompts: Tensor, length: int, *, temperature: float = 1.0, end: int | None = None
) -> Tensor:
    """Prompts (N, P) with up to `length` tokens more, (N, ≤ P + length), from the whole distribution.

    Nothing else has a say: what the model's own `generation_config` asks for is left aside.

    Args:
        temperature: 0 takes the most likely token.
        end: the token that ends a text and pads shorter ones; None: texts go on after any.
    """
    prompts = prompts.to(model.device)
    choice = SAMPLING | {"temperature": temperature} if temperature else {"do_sample": False}
    options = GenerationConfig(**choice, max_new_tokens=length, eos_token_id=end, pad_token_id=end)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=options)
    finally:
        model.generation_config = own


def draw_prompts(tokens: np.ndarray, count: int, length: int, seed: int) -> Tensor:
    """(count, length) passages from random places of a stream of tokens (N,).

    Raises:
        ValueError: if the stream is shorter than a passage.
    """
    if len(tokens) < length:
        raise ValueError(f"prompts of {length} tokens cannot be drawn from a text of {len(tokens)}")
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, count)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


@dataclass(frozen=True)
class Writing:
    """Figures of N texts that a model wrote.

    Attributes:
        sample_perplexity: of the texts under the base.
        distinct_1, distinct_2, distinct_3: distinct sequences of so many tokens over all such sequences, all texts
            together (Li et al. 2016, arXiv 1510.03055).
        repetition: share of a text's sequences of 4 tokens that it had before, mean over texts (seq-rep-4 of Welleck
            et al. 2019, arXiv 1908.04319).
        new_names: names that a text has after its first 50 tokens and not before, its prompt included, each counted
            once, mean over texts: more than the base's are drift, who is who gets lost.
        without: of each figure, the N values that it has without one of the texts.
    """

    sample_perplexity: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition: float
    new_names: float
    without: dict[str, np.ndarray] = field(compare=False, repr=False)

    def beside(self, base: Writing) -> dict[str, dict[str, float | None]]:
        """Each figure with the base's own, the relative difference, and its standard error.

        The error is the jackknife's over texts (Efron & Stein 1981), a text of the variant going together with the
        base's of the same prompt. None where the base's own figure is 0, the error also for a single text.
        """
        return {name: self._beside(base, name) for name in self.without}

    def _beside(self, base: Writing, name: str) -> dict[str, float | None]:
        variant, own = getattr(self, name), getattr(base, name)
        difference = variant / own - 1 if own else None
        error, count = None, len(base.without[name])
        if count > 1 and base.without[name].all():
            error = float((self.without[name] / base.without[name]).std() * (count - 1) ** 0.5)
        return {"variant": variant, "base": own, "difference": difference, "error": error}


@torch.no_grad()
def measure_writing(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    length: int,
    seed: int,
    *,
    description: str | None = None,
) -> Writing:
    """Has a model continue prompts, and measures what it wrote, the prompts not included.

    The same seed gives two models the same random numbers, token by token.

    Args:
        model: in evaluation mode, as is the base.
        prompts: (N, P ≥ 1).
        length: tokens to write after each.
        description: what a progress bar on stderr says; None shows none.

    Raises:
        ValueError: if the texts do not fit the model, or are too short for a sequence of 4.
    """
    limit = position_limit(model)
    room = length if limit is None else limit - prompts.shape[1]
    if not 4 <= length <= room:
        most = "or more" if limit is None else f"to {room}"
        raise ValueError(f"after prompts of {prompts.shape[1]} tokens, texts must have 4 {most}, not {length}")
    losses, written = [], []
    names: list[int] = []
    batches = tqdm(prompts.split(BATCH), unit="batch", desc=description, disable=description is None, leave=False)
    with seeded(seed, model.device):
        for batch in batches:
            texts = continue_texts(model, batch, length)
            losses += _losses(base, texts, length)
            written.append(texts[:, -length:])
            names += [count_new_names(tokenizer, text, prompts.shape[1] + SETTLED) for text in texts.tolist()]
    return describe_texts(np.array(losses), torch.cat(written).numpy(force=True), np.array(names))


def count_new_names(tokenizer: PreTrainedTokenizerBase, text: list[int], start: int) -> int:
    """How many names a text of tokens has after `start` of them and not before.

    A name is a capitalised word inside a sentence (see `names.find_names`); it was there before also where it began a
    sentence.
    """
    whole, head = (decode(tokenizer, part, skip_special_tokens=True) for part in (text, text[:start]))
    before = {match[0] for match in NAME.finditer(whole) if match.start() < len(head)}
    return len({match[0] for match in INSIDE.finditer(whole) if match.start() >= len(head)} - before)


def describe_texts(losses: np.ndarray, texts: np.ndarray, names: np.ndarray) -> Writing:
    """Figures of texts.

    Args:
        losses: (N,) mean nats of their tokens under the base.
        texts: (N, T) tokens.
        names: (N,) how many new names each has.
    """
    repeated = np.array([1 - _distinct(_sequences(text[None], 4))[0] for text in texts])
    figures = {
        "sample_perplexity": tuple(map(np.exp, _mean(losses))),
        **{f"distinct_{size}": _distinct(_sequences(texts, size)) for size in (1, 2, 3)},
        "repetition": _mean(repeated),
        "new_names": _mean(names),
    }
    return Writing(
        **{name: float(value) for name, (value, _) in figures.items()},
        without={name: values for name, (_, values) in figures.items()},
    )


def _sequences(texts: np.ndarray, size: int) -> np.ndarray:
    """All sequences (N, T − size + 1, size) of so many tokens of texts (N, T)."""
    return np.lib.stride_tricks.sliding_window_view(texts, size, axis=1)


def _mean(values: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of (N,) values, and the means without each one."""
    return values.mean(), (values.sum() - values) / max(1, len(values) - 1)


def _distinct(sequences: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of distinct ones among sequences (N, M, n) of N texts, and the shares without each text."""
    count, each = sequences.shape[:2]
    distinct, which = np.unique(sequences.reshape(count * each, -1), axis=0, return_inverse=True)
    holders = np.unique(np.stack([which.reshape(-1), np.arange(count).repeat(each)]), axis=1)
    held_by = np.bincount(holders[0])
    alone = np.bincount(holders[1], weights=held_by[holders[0]] == 1, minlength=count)  # that no other text has
    return len(distinct) / (count * each), (len(distinct) - alone) / (max(1, count - 1) * each)


def _losses(base: PreTrainedModel, texts: Tensor, length: int) -> list[float]:
    """Mean nats of the last `length` tokens of each of texts (N, T)."""
    weight, hidden = output_matrix(base), last_hidden(base, texts)[:, -length - 1 : -1]
    return [
        vocabulary_loss(inputs, weight, {"ce": 1.0}, labels=labels)[0].item() / length
        for inputs, labels in zip(hidden, texts[:, -length:], strict=True)
    ]
