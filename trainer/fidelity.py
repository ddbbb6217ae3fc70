"""How close a variant is to its base, and how well each predicts a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .losses import CHUNK_TOKENS
from .stages import last_hidden, output_matrix


@dataclass(frozen=True)
class Fidelity:
    """Means over the predicted tokens of a text.

    Attributes:
        tokens: how many were predicted.
        kl: KL(base ‖ variant) of the next-token distributions, nats per token.
        perplexity: of the text under the variant.
        base_perplexity: of the text under the base.
        top1_agreement: share of tokens for which both have the same most likely one.
    """

    tokens: int
    kl: float
    perplexity: float
    base_perplexity: float
    top1_agreement: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def measure(
    variant: PreTrainedModel,
    base: PreTrainedModel | None,
    tokens: np.ndarray,
    context: int,
    batch_size: int = 8,
    *,
    description: str | None = None,
) -> Fidelity:
    """Measures on a stream of tokens, cut into blocks of `context`: block i is tokens i·context to (i+1)·context − 1.

    In each block every token but the first is predicted, once, from the tokens of its block that come before it. The
    last block may be shorter; a block of a single token predicts nothing. So N tokens give N − ⌈N / context⌉
    predictions.

    Args:
        base: the base; None measures a base alone, with itself as the base.
        tokens: (N,) with N ≥ 2.
        batch_size: blocks of a forward pass.
        description: what a progress bar on stderr says; None shows none.

    Raises:
        ValueError: if there are fewer than 2 tokens, or the context is longer than the model's.
    """
    if len(tokens) < 2:
        raise ValueError("a text of at least 2 tokens is needed to predict one")
    if context > variant.config.max_position_embeddings:
        raise ValueError(
            f"the model holds {variant.config.max_position_embeddings} tokens; a context of {context} is more"
        )
    modes = [(model, model.training) for model in (variant, base) if model is not None]
    for model, _ in modes:
        model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    with tqdm(total=len(tokens), unit="tok", desc=description, disable=description is None, leave=False) as bar:
        for batch in _batches(tokens, context, batch_size):
            sums += _batch_sums(variant, base, batch.to(variant.device)).cpu()
            count += batch.shape[0] * (batch.shape[1] - 1)
            bar.update(batch.numel())
    for model, training in modes:
        model.train(training)
    kl, loss, base_loss, agreement = sums / count
    return Fidelity(count, kl.item(), loss.exp().item(), base_loss.exp().item(), agreement.item())


def _batches(tokens: np.ndarray, context: int, batch_size: int) -> list[Tensor]:
    whole = len(tokens) // context * context
    blocks = torch.from_numpy(tokens.astype(np.int64))
    batches = list(blocks[:whole].view(-1, context).split(batch_size)) if whole else []
    if len(tokens) - whole > 1:
        batches.append(blocks[None, whole:])
    return batches


def _batch_sums(variant: PreTrainedModel, base: PreTrainedModel | None, input_ids: Tensor) -> Tensor:
    """(4,) sums of KL, loss, the base's loss and agreement over the tokens of a batch."""
    labels = input_ids[:, 1:].flatten()
    hidden = last_hidden(variant, input_ids)[:, :-1].flatten(0, 1)
    base_hidden = hidden if base is None else last_hidden(base, input_ids)[:, :-1].flatten(0, 1)
    weight, base_weight = output_matrix(variant), output_matrix(variant if base is None else base)
    sums = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        log_q = (hidden[part] @ weight.t()).float().log_softmax(-1)
        log_p = log_q if base is None else (base_hidden[part] @ base_weight.t()).float().log_softmax(-1)
        sums += _chunk_sums(log_p, log_q, labels[part, None])
    return sums


def _chunk_sums(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    losses = [-log.gather(1, labels)[:, 0] for log in (log_q, log_p)]
    agreement = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([value.double().sum() for value in (kl, *losses, agreement)])
