"""How models see a text that is given: what the score tab and its endpoint show.

Every token is predicted by each model from what comes before it, and the models' distributions are compared with the
base's and with one another. A text longer than the context is read in windows that overlap by half, so that a token
past the first window has at least half a context before it.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attention.prompts import prompt_tokens

from .busy import BUSY, COMPUTING
from .hits import distances
from .models import LoadedModel, LoadError, ModelStore, said
from .text import TokenTexts, clean

logger = logging.getLogger(__name__)

PLACES = 50
BEFORE = 12  # tokens shown before a place


class ScoreError(ValueError):
    """A text that cannot be scored; the message is for the person who asked for it."""


@dataclass
class Seen:
    """How one model sees the text's tokens from the second on, (T - 1,) each.

    Attributes:
        kl: KL(base ‖ model) of the next-token distributions, in nats.
        probability, rank: the model's for the token that comes; rank 1 is the most probable.
        agrees: whether its most probable token is the base's.
    """

    kl: Tensor
    probability: Tensor
    rank: Tensor
    agrees: Tensor


@dataclass
class TextScores:
    """A text as several models of one base see it; it grows window by window.

    Attributes:
        names: the models.
        base: the name of their base; it need not be among them.
        token_ids, tokens: the whole text.
        seen: for each model what it saw so far.
        parting: (T - 1,) Jensen-Shannon divergence between all of the models at each token, in nats: 0 where they say
            the same, at most the logarithm of their number.
        hits: (T,) how many tokens back each token can be looked up, 0 for one that is no hit; empty where that is not
            known, see `hits.distances`.
        problems: for each model that failed, why.
        ended: why it ended before the text did, or "".
    """

    names: tuple[str, ...]
    base: str
    token_ids: list[int]
    tokens: list[str]
    seen: dict[str, Seen] = field(default_factory=dict)
    parting: Tensor = field(default_factory=lambda: torch.empty(0))
    hits: list[int] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    ended: str = ""

    @property
    def scored(self) -> int:
        """How many tokens have a score; the first one has none."""
        return len(self.parting)

    def means(self, where: Tensor | None = None) -> list[dict[str, Any]]:
        """Each model's means over the scored tokens, or over those that `where`, (scored,), picks.

        Returns:
            For each model `name`, `tokens`, `kl` (nats per token), `perplexity`, and `same_top` (the share of tokens
            at which its most probable token is the base's).
        """
        pick = torch.ones(self.scored, dtype=torch.bool) if where is None else where
        return [{"name": name, "tokens": int(pick.sum()), **_means(seen, pick)} for name, seen in self.seen.items()]

    def means_of_hits(self) -> list[dict[str, Any]]:
        """`means` over the tokens that have to be looked up; empty where there are none, or it is not known."""
        where = torch.tensor(self.hits[1 : self.scored + 1], dtype=torch.bool)
        return self.means(where) if where.any() else []

    def by_position(self) -> list[dict[str, Any]]:
        """Means over tokens 1 to 63 of the text, 64 to 127, 128 to 255, and so on.

        Returns:
            For each range `start`, `end` (exclusive) and `models`, which is what `means` gives for it.
        """
        edges = [1, *(64 << i for i in range(32))]
        position = torch.arange(1, self.scored + 1)
        ranges = [(a, min(b, self.scored + 1)) for a, b in pairwise(edges) if a <= self.scored]
        return [{"start": a, "end": b, "models": self.means((position >= a) & (position < b))} for a, b in ranges]

    def places(self, count: int = PLACES) -> list[dict[str, Any]]:
        """Where the models part most, the farthest apart first.

        Returns:
            For each place its `position` in the text, the text `before` it, the `token`, the `parting`, and each
            model's `kl` and `probability` by name.
        """
        order = self.parting.argsort(descending=True)[:count].tolist() if len(self.seen) > 1 else []
        return [self._place(index) for index in order]

    def _place(self, index: int) -> dict[str, Any]:
        position = index + 1
        return {
            "position": position,
            "before": "".join(self.tokens[max(position - BEFORE, 0) : position]),
            "token": self.tokens[position],
            "parting": round(float(self.parting[index]), 5),
            "models": {
                name: {"kl": round(float(s.kl[index]), 5), "probability": round(float(s.probability[index]), 6)}
                for name, s in self.seen.items()
            },
        }

    def summary(self) -> dict[str, Any]:
        """Means, means by position, and places, as plain JSON data."""
        return {
            "base": self.base,
            "tokens": len(self.tokens),
            "scored": self.scored,
            "ended": self.ended,
            "problems": self.problems,
            "means": self.means(),
            "means_of_hits": self.means_of_hits(),
            "by_position": self.by_position(),
            "places": self.places(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Each scored token with every model's numbers, as plain JSON data."""
        columns = {name: _lists(seen) for name, seen in self.seen.items()}
        partings = [round(value, 5) for value in self.parting.tolist()]
        return [
            {
                "position": i + 1,
                "token": self.tokens[i + 1],
                "parting": partings[i],
                "hit": self.hits[i + 1] if self.hits else None,
                "models": {
                    name: {"kl": kl[i], "probability": probability[i], "rank": rank[i]}
                    for name, (kl, probability, rank) in columns.items()
                },
            }
            for i in range(self.scored)
        ]

    def csv(self) -> str:
        """The same as a table: a line for each token, three columns for each model; `hit` is how far back it stands."""
        file = io.StringIO()
        writer = csv.writer(file)
        kinds = ("kl", "probability", "rank")
        writer.writerow(
            ["position", "token", "parting", "hit", *(f"{name} {kind}" for name in self.seen for kind in kinds)]
        )
        for row in self.rows():
            numbers = [row["models"][name][kind] for name in self.seen for kind in kinds]
            writer.writerow([row["position"], row["token"], row["parting"], row["hit"], *numbers])
        return file.getvalue()


def _means(seen: Seen, pick: Tensor) -> dict[str, float | None]:
    if not pick.any():
        return {"kl": None, "perplexity": None, "same_top": None}
    surprise = -seen.probability[pick].double().clamp(min=1e-30).log().mean().item()
    return {
        "kl": round(seen.kl[pick].double().mean().item(), 6),
        "perplexity": round(math.exp(surprise), 4),
        "same_top": round(seen.agrees[pick].double().mean().item(), 4),
    }


def _lists(seen: Seen) -> tuple[list[float], list[float], list[int]]:
    kl = [round(value, 5) for value in seen.kl.tolist()]
    return kl, [round(value, 6) for value in seen.probability.tolist()], seen.rank.tolist()


def windows(total: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of each window over `total` tokens: it reads start to end and is scored from `first` on."""
    first, end = 1, min(context, total)
    start = 0
    while first < end:
        yield start, first, end
        first = end
        start = first - max(context // 2, 1)
        end = min(start + context, total)


def score_text(store: ModelStore, names: Sequence[str], text: str) -> Iterator[TextScores]:
    """Yields the same scores as they grow, first with none; ends with what there is at the store's time limit.

    A model that fails is named among the problems, and the others go on.

    Raises:
        ScoreError: if there is nothing to score, or the models are not of one base.
    """
    deadline = time.monotonic() + store.limits.seconds
    base, loaded, problems = _load(store, names)
    scores = _empty(base, list(loaded), text)
    scores.problems = problems
    yield scores
    context = min(model.context for model in (base, *loaded.values()))
    for start, first, end in windows(len(scores.token_ids), context):
        if store.closing.is_set():
            return
        if time.monotonic() > deadline:
            scores.ended = f"time limit of {store.limits.seconds:.0f} s reached"
            break
        try:
            with BUSY.doing(COMPUTING):
                _add_window(scores, base, loaded, scores.token_ids[start:end], first - start)
        except Exception as error:  # of the base, without which there is nothing to compare with
            logger.exception("%s failed while it read", base.name)
            scores.ended = f"{base.name} failed: {said(error)}"
            break
        yield scores
    yield scores


def _load(store: ModelStore, names: Sequence[str]) -> tuple[LoadedModel, dict[str, LoadedModel], dict[str, str]]:
    loaded: dict[str, LoadedModel] = {}
    problems: dict[str, str] = {}
    for name in names:
        try:
            loaded[name] = store.get(name)
        except LoadError as error:
            problems[name] = str(error)
    bases = {model.base.name: model.base for model in loaded.values() if model.base is not None}
    if not loaded:
        raise ScoreError("None of the models can be used: " + " ".join(problems.values()))
    if len(bases) != 1 or any(model.base is None for model in loaded.values()):
        raise ScoreError("Choose models of one base: only they cut a text into the same tokens and can be compared.")
    return next(iter(bases.values())), loaded, problems


def _empty(base: LoadedModel, names: list[str], text: str) -> TextScores:
    try:
        token_ids = prompt_tokens(base.tokenizer, clean(text))
    except ValueError as error:
        raise ScoreError(f"The text cannot be read: {error}") from error
    if len(token_ids) < 2:
        raise ScoreError("The text is too short: it takes two tokens for one to be predicted.")
    texts = TokenTexts(base.tokenizer)
    tokens = [texts.next(token_id) for token_id in token_ids]
    return TextScores(tuple(names), base.name, token_ids, tokens, hits=distances(base, token_ids))


@torch.inference_mode()
def _add_window(
    scores: TextScores, base: LoadedModel, loaded: dict[str, LoadedModel], token_ids: list[int], first: int
) -> None:
    expected = torch.tensor(token_ids[first:])[:, None]
    base_log = _predictions(base, token_ids, first)
    base_top = base_log.argmax(-1)
    mixture = torch.zeros_like(base_log)
    entropies = torch.zeros(len(base_log))
    count = 0
    for name, model in loaded.items():
        if name in scores.problems:
            continue
        try:
            log = base_log if model is base else _predictions(model, token_ids, first)
        except Exception as error:
            logger.exception("%s failed while it read", name)
            scores.problems[name] = f"The model failed: {said(error)}"
            scores.seen.pop(name, None)
            continue
        own = log.gather(1, expected)
        kl = (base_log.exp() * (base_log - log)).sum(-1).clamp(min=0)  # rounding can take it just below
        new = Seen(kl, own.exp()[:, 0], (log > own).sum(-1) + 1, log.argmax(-1) == base_top)
        scores.seen[name] = _joined(scores.seen.get(name), new)
        mixture += log.exp()
        entropies -= (log.exp() * log).sum(-1)
        count += 1
    mixture /= max(count, 1)
    entropy = -(mixture * mixture.clamp(min=1e-30).log()).sum(-1)
    scores.parting = torch.cat([scores.parting, (entropy - entropies / max(count, 1)).clamp(min=0)])


def _predictions(loaded: LoadedModel, token_ids: list[int], first: int) -> Tensor:
    """(n - first, V) logarithms of the probabilities with which the tokens from `first` on are predicted."""
    input_ids = torch.tensor([token_ids[:-1]], device=loaded.model.device)
    with loaded.lock:
        output = loaded.model(input_ids, use_cache=False, logits_to_keep=len(token_ids) - first)
    logits = output.logits[0].float().cpu()
    if not logits.isfinite().all():
        raise ArithmeticError("what it predicts is not finite; its weights are broken")
    return logits.log_softmax(-1)


def _joined(before: Seen | None, new: Seen) -> Seen:
    if before is None:
        return new
    return Seen(*(torch.cat([getattr(before, name), getattr(new, name)]) for name in vars(new)))


def check(text: Any, names: Any, store: ModelStore) -> tuple[str, list[str]]:
    """An untrusted text and names of models, as `score_text` takes them.

    Raises:
        ScoreError: naming all that is wrong with them.
    """
    problems = []
    limit = store.limits.prompt_characters
    if not isinstance(text, str) or not text.strip():
        problems.append("The text is empty: paste one, or choose a file.")
    elif len(text) > limit:
        problems.append(f"The text has {len(text):,} characters; at most {limit:,} are read.")
    if not isinstance(names, list | tuple) or not names:
        problems.append("No model is chosen: tick at least one.")
    elif unknown := [str(name)[:80] for name in names if name not in store.names()]:
        problems.append(f"No model {', '.join(unknown)}; there are: {', '.join(store.names())}.")
    elif len(names) > store.limits.models_per_run or len(set(names)) < len(names):
        problems.append(f"Choose up to {store.limits.models_per_run} different models.")
    if problems:
        raise ScoreError("\n".join(problems))
    return clean(text), list(names)
