"""How a model writes: texts it samples, judged by the base and counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .losses import vocabulary_loss
from .samples import sample_texts, seeded
from .stages import last_hidden, output_matrix


@dataclass(frozen=True)
class Writing:
    """Figures of texts sampled at temperature 1 from eos on.

    Attributes:
        sample_perplexity: of the texts under the base.
        distinct_2: distinct pairs of neighbouring tokens over all pairs, all texts together (Li et al. 2016, arXiv
            1510.03055).
        repetition: share of a text's sequences of 4 tokens that it had before, mean over texts (seq-rep-4 of Welleck
            et al. 2019, arXiv 1908.04319).
    """

    sample_perplexity: float
    distinct_2: float
    repetition: float


@torch.no_grad()
def measure_writing(
    model: PreTrainedModel, base: PreTrainedModel, count: int = 64, length: int = 200, seed: int = 0
) -> Writing:
    """Has a model write `count` texts of `length` tokens after eos; the same seed for base and variant is fair.

    Raises:
        ValueError: if the texts are longer than the model's positions, or too short for a sequence of 4.
    """
    if not 4 <= length < model.config.max_position_embeddings:
        raise ValueError(f"texts must have 4 to {model.config.max_position_embeddings - 1} tokens, not {length}")
    with seeded(seed, model.device):
        texts = sample_texts(model, count, length + 1)
    losses = [_loss(base, part) for part in texts.split(8)]
    written = texts[:, 1:]
    return Writing(
        sample_perplexity=(torch.stack(losses).sum() / written.numel()).exp().item(),
        distinct_2=_distinct(written.unfold(1, 2, 1).flatten(0, 1)),
        repetition=1 - sum(_distinct(text.unfold(0, 4, 1)) for text in written) / count,
    )


def _loss(base: PreTrainedModel, texts: Tensor) -> Tensor:
    """Nats of all tokens but the first of each text."""
    hidden = last_hidden(base, texts)[:, :-1].flatten(0, 1)
    return vocabulary_loss(hidden, output_matrix(base), {"ce": 1.0}, labels=texts[:, 1:].flatten())[0]


def _distinct(sequences: Tensor) -> float:
    """Share of distinct rows among rows (N, n)."""
    return len(sequences.unique(dim=0)) / len(sequences)
