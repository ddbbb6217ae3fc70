"""How far back a prediction reaches: which earlier tokens change it when they are changed themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .busy import BUSY, COMPUTING
from .mechanisms import Change, applied, as_variant
from .models import LoadedModel

BUDGET = 2**16  # tokens that are read for one model
ROWS = 8  # texts that are read at once
NOISE = 1e-8  # nats: a change below it is rounding


@dataclass(frozen=True)
class Reach:
    """What changing tokens changes in the prediction after one of them.

    Attributes:
        effects: (T,) KL(as it is ‖ with this token changed) in nats; tokens that are changed together share one.
        together: how many neighbouring tokens were changed at a time.
    """

    effects: Tensor
    together: int

    @property
    def reached(self) -> Tensor:
        """(T,) booleans."""
        return self.effects > NOISE


@torch.inference_mode()
def reach(loaded: LoadedModel, token_ids: tuple[int, ...], change: Change, seed: int = 0) -> Iterator[float | Reach]:
    """Changes every token of a text, one or a few neighbours at a time, to a random other one.

    Yields:
        The share that is done, and at the end the reach of the prediction after the last token.
    """
    variant, length = as_variant(loaded), len(token_ids)
    together = max(1, -(-length * length // BUDGET))
    ids = torch.tensor(token_ids)
    groups = torch.arange(length).split(together)
    texts = ids.repeat(len(groups), 1)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = loaded.model.config.vocab_size
    shift = torch.randint(1, vocabulary, (length,), generator=generator)
    for text, group in zip(texts, groups, strict=True):
        text[group] = (text[group] + shift[group]) % vocabulary
    as_it_is = _last(variant, ids[None], loaded, change)[0]
    effects: list[Tensor] = []
    for start in range(0, len(texts), ROWS):
        changed = _last(variant, texts[start : start + ROWS], loaded, change)
        effects.append((as_it_is.exp() * (as_it_is - changed)).sum(-1).clamp(min=0))
        yield min(1.0, (start + ROWS) / len(texts))
    by_group = torch.cat(effects)
    yield Reach(by_group.repeat_interleave(together)[:length].float(), together)


def _last(variant: torch.nn.Module, ids: Tensor, loaded: LoadedModel, change: Change) -> Tensor:
    """(B, V) log-probabilities after the last token, in float64 so that only rounding of the model is left."""
    with BUSY.doing(COMPUTING), loaded.lock, applied(list(variant.mechanisms), change):
        logits = variant(ids.to(loaded.model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.double().cpu().log_softmax(-1)
