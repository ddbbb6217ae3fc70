"""How close variants are to their base, and how well each predicts a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from attention.variant import position_limit

from .losses import chunk_size, last_hidden, output_matrix


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


@dataclass(frozen=True)
class Reading:
    """What a reader made of every predicted token of a text, in the order of the text.

    Attributes:
        kl: (N,) float32 KL(base ‖ reader), nats.
        loss: (N,) float32 cross-entropy under the reader, nats.
        base_loss: (N,) float32 cross-entropy under the base.
        agreement: (N,) float32, 1 where both have the same most likely token, else 0.
    """

    kl: np.ndarray
    loss: np.ndarray
    base_loss: np.ndarray
    agreement: np.ndarray

    def first(self, count: int) -> Reading:
        """What it made of so many tokens, the first ones; up to rounding it does not depend on later ones."""
        return Reading(self.kl[:count], self.loss[:count], self.base_loss[:count], self.agreement[:count])

    @property
    def means(self) -> Fidelity:
        """The means over all tokens."""
        means = [
            float(values.mean(dtype=np.float64)) for values in (self.kl, self.loss, self.base_loss, self.agreement)
        ]
        return Fidelity(len(self.kl), means[0], float(np.exp(means[1])), float(np.exp(means[2])), means[3])


@dataclass(frozen=True)
class Reader:
    """A model that reads a text, with parts of its mechanisms switched off.

    Attributes:
        model: a variant, or a base, which has no parts.
        without: the parts that are off in every layer, of those in `Mechanism.branches`.
    """

    model: PreTrainedModel
    without: tuple[str, ...] = ()

    def hidden(self, input_ids: Tensor) -> Tensor:
        """(B, T, E) what the output matrix is applied to."""
        with switched_off(self.model, self.without):
            return last_hidden(self.model, input_ids)


@contextmanager
def switched_off(model: PreTrainedModel, parts: Sequence[str]) -> Iterator[None]:
    """Switches off parts of the mechanism of every layer that has them inside the block.

    Raises:
        ValueError: if no layer's mechanism has a part.
    """
    mechanisms = getattr(model, "mechanisms", []) if parts else []
    branches = {name for mechanism in mechanisms for name in mechanism.branches}
    if mechanisms and (unknown := set(parts) - branches):
        raise ValueError(f"no branch {sorted(unknown)} in any layer; there are {sorted(branches)}")
    before = [mechanism.disabled for mechanism in mechanisms]
    try:
        for mechanism in mechanisms:
            mechanism.disable(*(name for name in parts if name in mechanism.branches))
        yield
    finally:
        for mechanism, names in zip(mechanisms, before, strict=True):
            mechanism.disable(*names)


def measure(
    variant: PreTrainedModel,
    base: PreTrainedModel | None,
    tokens: np.ndarray,
    context: int,
    batch_size: int = 8,
    *,
    description: str | None = None,
) -> Fidelity:
    """The means of one variant; see `read_each`. None as the base measures a base alone, with itself as the base."""
    readers = [Reader(variant)]
    return measure_each(readers, base or variant, tokens, context, batch_size, description=description)[0]


def measure_each(
    readers: Sequence[Reader],
    base: PreTrainedModel,
    tokens: np.ndarray,
    context: int,
    batch_size: int = 8,
    *,
    description: str | None = None,
) -> list[Fidelity]:
    """The means of what each of several readers makes of a text; see `read_each`."""
    readings = read_each(readers, base, tokens, context, batch_size, description=description)
    return [reading.means for reading in readings]


@torch.no_grad()
def read_each(
    readers: Sequence[Reader],
    base: PreTrainedModel,
    tokens: np.ndarray,
    context: int,
    batch_size: int = 8,
    *,
    description: str | None = None,
) -> list[Reading]:
    """Reads a stream of tokens, cut into blocks of `context`: block i is tokens i·context to (i+1)·context − 1.

    In each block every token but the first is predicted, once, from the tokens of its block that come before it. The
    last block may be shorter; a block of a single token predicts nothing. So N tokens give N − ⌈N / context⌉
    predictions, one for each place of `predicted`. The base reads the text once, whatever the number of readers.

    Args:
        readers: what is measured, of one vocabulary.
        base: what they are compared with.
        tokens: (N,) with N ≥ 2.
        batch_size: blocks of a forward pass.
        description: what a progress bar on stderr says; None shows none.

    Raises:
        ValueError: if there are fewer than 2 tokens, or the context is longer than the models'.
    """
    if len(tokens) < 2:
        raise ValueError("a text of at least 2 tokens is needed to predict one")
    models = list(dict.fromkeys([base, *(reader.model for reader in readers)]))
    limits = [limit for limit in map(position_limit, models) if limit is not None]
    if limits and context > (room := min(limits)):
        raise ValueError(f"the model holds {room} tokens; a context of {context} is more")
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    batches = []
    with tqdm(total=len(tokens), unit="tok", desc=description, disable=description is None, leave=False) as bar:
        for batch in _batches(tokens, context, batch_size):
            batches.append(_read_batch(readers, base, batch.to(base.device)).numpy(force=True))
            bar.update(batch.numel())
    for model, training in zip(models, modes, strict=True):
        model.train(training)
    return [Reading(*values) for values in np.concatenate(batches, 2)]


def predicted(length: int, context: int) -> np.ndarray:
    """The places of the tokens that are predicted in a stream of so many, ascending: all but each block's first."""
    places = np.arange(length)
    return places[places % context != 0]


def _batches(tokens: np.ndarray, context: int, batch_size: int) -> list[Tensor]:
    whole = len(tokens) // context * context
    blocks = torch.from_numpy(tokens.astype(np.int64))
    batches = list(blocks[:whole].view(-1, context).split(batch_size)) if whole else []
    if len(tokens) - whole > 1:
        batches.append(blocks[None, whole:])
    return batches


def _read_batch(readers: Sequence[Reader], base: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(R, 4, N) float32 for each reader, KL, loss, the base's loss and agreement of the N tokens of a batch."""
    labels = input_ids[:, 1:].flatten()
    base_hidden = last_hidden(base, input_ids)[:, :-1].flatten(0, 1)
    same = [reader.model is base for reader in readers]
    hidden = [
        base_hidden if is_base else reader.hidden(input_ids)[:, :-1].flatten(0, 1)
        for reader, is_base in zip(readers, same, strict=True)
    ]
    values = torch.empty(len(readers), 4, len(labels), device=labels.device)
    chunk = chunk_size(output_matrix(base))
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        log_p = _log_probabilities(base_hidden[part], base)
        for place, reader in enumerate(readers):
            log_q = log_p if same[place] else _log_probabilities(hidden[place][part], reader.model)
            values[place, :, part] = _read_chunk(log_p, log_q, labels[part, None])
    return values


def _log_probabilities(hidden: Tensor, model: PreTrainedModel) -> Tensor:
    return (hidden @ output_matrix(model).t()).float().log_softmax(-1)


def _read_chunk(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    losses = [-log.gather(1, labels)[:, 0] for log in (log_q, log_p)]
    agreement = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([kl, *losses, agreement.float()])
