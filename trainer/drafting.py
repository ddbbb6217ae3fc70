"""How far a base goes along with what a variant drafts for it: speculative decoding, counted and not timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .losses import last_hidden, output_matrix
from .samples import BATCH, continue_texts

DRAFT = 4  # tokens of a draft, γ
PROMPTS = 64  # texts that are enough for a standard error of a hundredth or two


@dataclass(frozen=True)
class Drafting:
    """What came of the drafts, text after text.

    Attributes:
        tokens_a_round: tokens that the text grows by in a round, mean over rounds: those of a draft up to the first
            that the base would not have written, and the base's own next one (arXiv 2211.17192, Section 3.1; greedy,
            so a token is accepted where it is the base's most likely one). From 1 to γ + 1.
        error: standard error of that, the jackknife's over texts (Efron & Stein 1981); None for a single text.
        draft: γ, tokens of a draft.
        prompts: how many texts.
        length: tokens of each.
    """

    tokens_a_round: float
    error: float | None
    draft: int
    prompts: int
    length: int

    def to_dict(self) -> dict[str, float | None]:
        """Plain data, by name."""
        return asdict(self)


@torch.no_grad()
def measure_drafting(
    models: list[PreTrainedModel],
    base: PreTrainedModel,
    prompts: Tensor,
    length: int,
    *,
    description: str | None = None,
) -> list[Drafting]:
    """Has each model draft for the base, which continues the first prompts, greedily.

    Nothing is drafted one by one: up to the first mistake a draft is the base's text, so a model's most likely tokens
    along that text, from one forward pass, tell how long each draft would hold.

    Args:
        models: in evaluation mode, as is the base.
        prompts: (N, P ≥ 1).
        length: tokens to write after each; at least γ + 1, or no draft would fit.
        description: what a progress bar on stderr says; None shows none.
    """
    agreed: list[list[np.ndarray]] = [[] for _ in models]
    batches = prompts[:PROMPTS].split(BATCH)
    for batch in tqdm(batches, unit="batch", desc=description, disable=description is None, leave=False):
        texts = continue_texts(base, batch, length, temperature=0)
        for found, model in zip(agreed, models, strict=True):
            found.append(_agreement(model, texts, length))
    return [count_drafts(np.concatenate(found)) for found in agreed]


def _agreement(model: PreTrainedModel, texts: Tensor, length: int) -> np.ndarray:
    """(N, length) whether each of a text's last tokens is the model's most likely one there."""
    weight, hidden = output_matrix(model), last_hidden(model, texts)[:, -length - 1 : -1]
    best = torch.stack([(row @ weight.T).argmax(-1) for row in hidden])
    return (best == texts[:, -length:]).numpy(force=True)


def count_drafts(agreed: np.ndarray, draft: int = DRAFT) -> Drafting:
    """Goes through texts round by round; the last rounds, whose draft would pass the end, are left out.

    Args:
        agreed: (N, T) whether the drafting model's most likely token is the text's, after the text so far.
        draft: γ, less than T.
    """
    count, length = agreed.shape
    tokens, rounds = np.zeros(count), np.zeros(count)
    for row in range(count):
        place = 0
        while place + draft < length:
            held = agreed[row, place : place + draft]
            accepted = draft if held.all() else int(held.argmin())
            tokens[row], rounds[row] = tokens[row] + accepted + 1, rounds[row] + 1
            place += accepted + 1
    without = (tokens.sum() - tokens) / np.maximum(rounds.sum() - rounds, 1)
    error = float(without.std() * (count - 1) ** 0.5) if count > 1 else None
    return Drafting(float(tokens.sum() / rounds.sum()), error, draft, count, length)
