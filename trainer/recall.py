"""Two tasks whose answers stand in the text, for any model in its own vocabulary.

- *associative*: eight facts, "Mary lives in London.", some tokens of another text, then the same facts in another
  order, of which the last word is to be predicted: multi-query associative recall (Arora et al. 2023, arXiv 2312.04927)
  in prose. The candidates are the eight places of the text, so that knowing which words it has is not enough.
- *needle*: one fact, "The name of the ship was Mary.", inside another text, and some tokens later its beginning again.
  The candidates are the name and seven that the text does not have.

The words are names that are one token in the vocabulary. Before the facts stand 64 tokens of the other text, as the
first tokens of all are easy to find for some methods. An answer counts as right if it is the likeliest candidate; its
score is its log-probability among the candidates. At chance a model picks one in eight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .losses import last_hidden, output_matrix
from .samples import BATCH

CANDIDATES = 8
LEAD = 64  # tokens of another text before the first fact
BETWEEN = (0, 64, *(256 << doubled for doubled in range(24)))  # tokens between facts and questions
NAME = re.compile(r"[A-Z][a-z]{2,}")
SPACES = "Ġ▁ "  # how vocabularies write the space before a word
OPENING, AGAIN, PLACE = "\nThis is what we know.", "\nOnce more.", " lives in"
SHIP = "\nThe name of the ship was"
CHANCE = 1 / CANDIDATES


@dataclass(frozen=True)
class Questions:
    """Texts of one length, each with questions at the same places.

    Attributes:
        texts: (N, T) tokens.
        places: (Q,) of the tokens that a question ends with.
        candidates: (N, Q, C) tokens that may answer each.
        answers: (N, Q) which of them does.
    """

    texts: Tensor
    places: Tensor
    candidates: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        scores: (N, Q) log-probability of each right answer among its candidates.
        right: (N, Q) 1 where it is the likeliest candidate, else 0.
    """

    scores: np.ndarray
    right: np.ndarray

    def to_dict(self) -> dict[str, float]:
        return {"score": float(self.scores.mean()), "right": float(self.right.mean())}


class Vocabulary:
    """The tasks' words and phrases as tokens.

    Attributes:
        names: (W,) tokens of names that are one token after a space.
        opening, again: what stands before facts and before questions.
        place, stop: what stands after the first and after the second name of a fact.
        ship: the beginning of the needle.

    Raises:
        ValueError: if there are too few such names, or the tokenizer joins words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        words = {token.strip(SPACES) for token in tokenizer.get_vocab()}
        found = {
            name: self._after(OPENING, f" {name}")
            for name in sorted(words)
            if NAME.fullmatch(name) and name.lower() not in words
        }
        names = {name: tokens[0] for name, tokens in found.items() if len(tokens) == 1}
        if len(names) < 2 * CANDIDATES:
            raise ValueError(
                f"the tasks of --recall need {2 * CANDIDATES} names that are one token; the vocabulary has {len(names)}"
            )
        one = f" {next(iter(names))}"
        self.names = np.array(list(names.values()))
        self.opening, self.again, self.ship = map(self._encode, (OPENING, AGAIN, SHIP))
        self.place, self.stop = self._after(OPENING + one, PLACE), self._after(OPENING + one + PLACE + one, ".")
        if not (self.place and self.stop):
            raise ValueError("the tasks of --recall need a tokenizer that splits between words")

    @property
    def least(self) -> int:
        """Tokens of the shortest text of the first task; those of the second are shorter."""
        return LEAD + len(self.opening) + len(self.again) + 2 * CANDIDATES * (2 + len(self.place) + len(self.stop))

    def _after(self, before: str, text: str) -> list[int]:
        """The tokens that a text adds; none where it changes those before."""
        first, whole = self._encode(before), self._encode(before + text)
        return whole[len(first) :] if whole[: len(first)] == first else []


class Item(NamedTuple):
    """One text: its tokens, the places where its Q questions end, their candidates (Q, C), which are right (Q,)."""

    text: list[int]
    places: list[int]
    candidates: np.ndarray
    answers: np.ndarray


def associative(words: Vocabulary, other: np.ndarray, rng: np.random.Generator) -> Item:
    """One text of the first task; what comes after the first `LEAD` tokens of another text stands in between."""
    names = _draw(words, other, 2 * CANDIDATES, rng)
    facts = names.reshape(CANDIDATES, 2)  # who, and where
    order, shuffled = rng.permutation(CANDIDATES), rng.permutation(facts[:, 1])

    def say(pairs: np.ndarray) -> list[int]:
        return [token for who, where in pairs.tolist() for token in (who, *words.place, where, *words.stop)]

    text = [*other[:LEAD].tolist(), *words.opening, *say(facts), *other[LEAD:].tolist(), *words.again]
    length = 2 + len(words.place) + len(words.stop)
    places = [len(text) + length * number + len(words.place) for number in range(CANDIDATES)]
    right = (shuffled == facts[order, 1:]).argmax(1)
    return Item(text + say(facts[order]), places, np.tile(shuffled, (CANDIDATES, 1)), right)


def needle(words: Vocabulary, other: np.ndarray, rng: np.random.Generator) -> Item:
    """One text of the second task; see `associative`."""
    candidates = _draw(words, other, CANDIDATES, rng)
    right = int(rng.integers(CANDIDATES))
    fact = [*words.ship, int(candidates[right]), *words.stop]
    text = [*other[:LEAD].tolist(), *fact, *other[LEAD:].tolist(), *words.ship]
    return Item(text, [len(text) - 1], candidates[None], np.array([right]))


TASKS: dict[str, Callable[[Vocabulary, np.ndarray, np.random.Generator], Item]] = {
    "associative": associative,
    "needle": needle,
}


def _draw(words: Vocabulary, other: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Names that the other text does not have, as far as there are enough."""
    free = np.setdiff1d(words.names, other)
    return rng.choice(free if len(free) >= count else words.names, count, replace=False)


def ask(
    task: str, words: Vocabulary, tokens: np.ndarray, count: int, between: int, context: int, seed: int
) -> Questions | None:
    """Texts of a task, the same for the same seed.

    Args:
        task: a key of `TASKS`.
        tokens: (N,) the other text.
        count: how many texts.
        between: tokens of the other text between facts and questions.

    Returns:
        None where they are longer than the context or the other text.
    """
    length = LEAD + between
    if length > min(context, len(tokens)):
        return None
    rng = np.random.default_rng((seed, list(TASKS).index(task), between))
    starts = rng.integers(0, len(tokens) - length + 1, count)
    items = [TASKS[task](words, tokens[start : start + length], rng) for start in starts]
    if len(items[0].text) > context:
        return None
    return Questions(
        texts=torch.tensor([item.text for item in items]),
        places=torch.tensor(items[0].places),
        candidates=torch.from_numpy(np.stack([item.candidates for item in items])),
        answers=torch.from_numpy(np.stack([item.answers for item in items])),
    )


@torch.no_grad()
def answer(model: PreTrainedModel, questions: Questions) -> Answers:
    """What a model in evaluation mode answers."""
    scores = []
    weight = output_matrix(model)
    for texts, candidates in zip(questions.texts.split(BATCH), questions.candidates.split(BATCH), strict=True):
        hidden = last_hidden(model, texts.to(model.device))[:, questions.places.to(model.device)]
        logits = (hidden @ weight.t()).float().gather(2, candidates.to(model.device))
        scores.append(logits.log_softmax(-1).cpu())
    logs = torch.cat(scores)
    right = logs.argmax(-1) == questions.answers
    return Answers(logs.gather(2, questions.answers[..., None])[..., 0].numpy(), right.float().numpy())


def measure_recall(
    models: Sequence[PreTrainedModel],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: np.ndarray,
    count: int,
    context: int,
    seed: int,
    *,
    description: str | None = None,
) -> list[dict[str, dict[str, dict[str, Any]]]]:
    """Has models answer both tasks, at 0, 64, 256, 512, ... tokens between facts and questions.

    Args:
        models: in evaluation mode, as is the base; of one vocabulary.
        tokens: (N,) text to stand between, which none of them has seen.
        count: texts a task and distance, of eight questions or one.
        context: tokens of a text at most; longer distances are left out.
        description: what a progress bar on stderr says; None shows none.

    Returns:
        For each model, by task and by tokens between: how many `questions`; `variant` and `base`, each with `score`
        (nats) and the share `right`; the `difference` of the scores; its standard `error` over texts (None for a single
        one); and whether the base is `at_chance`: right no more often than one in eight by twice the standard error.

    Raises:
        ValueError: if no text fits the context, or the vocabulary does not do.
    """
    words = Vocabulary(tokenizer)
    if context < words.least or len(tokens) < LEAD:
        raise ValueError(
            f"the tasks of --recall need a context of {words.least} tokens and a text of {LEAD}; got {context} and "
            f"{len(tokens)}"
        )
    asked = {
        (task, between): questions
        for task in TASKS
        for between in BETWEEN
        if (questions := ask(task, words, tokens, count, between, context, seed)) is not None
    }
    rows: list[dict[str, Any]] = [{task: {} for task in TASKS} for _ in models]
    total = len(asked) * (1 + len(models))
    with tqdm(total=total, desc=description, disable=description is None, leave=False) as bar:
        for (task, between), questions in asked.items():
            own = answer(base, questions)
            bar.update()
            for row, model in zip(rows, models, strict=True):
                row[task][str(between)] = _beside(own if model is base else answer(model, questions), own)
                bar.update()
    return rows


def _beside(variant: Answers, base: Answers) -> dict[str, Any]:
    return {
        "questions": variant.right.size,
        "variant": variant.to_dict(),
        "base": base.to_dict(),
        "difference": float((variant.scores - base.scores).mean()),
        "error": _error(variant.scores - base.scores),
        "at_chance": bool(base.right.mean() - 2 * (_error(base.right) or 0.0) <= CHANCE),
    }


def _error(values: np.ndarray) -> float | None:
    """The standard error of the mean of (N, Q) values, over N texts."""
    means = values.mean(1, dtype=np.float64)
    return float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
