"""What models say comes next in a text that they read, and how far that is from the base's word."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .text import token_label

TOP = 5
CHUNK = 64  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Predictions:
    """A model's next-token distributions after each of the W tokens shown.

    Attributes:
        logits: (W, V) in float32.
        targets: (W − 1,) the tokens that did come next.
    """

    logits: Tensor
    targets: Tensor

    @classmethod
    def of(cls, logits: Tensor, token_ids: tuple[int, ...]) -> Predictions:
        """Those of logits (W, V) after `token_ids` (W)."""
        return cls(logits.float().cpu(), torch.tensor(token_ids[1:], dtype=torch.long))

    def loss(self) -> float | None:
        """Mean cross-entropy of the tokens that came next, in nats; None for a single token."""
        if not len(self.targets):
            return None
        return float(torch.nn.functional.cross_entropy(self.logits[:-1], self.targets))

    def kl_from(self, base: Predictions) -> Tensor:
        """(W,) KL(base ‖ these) in nats."""
        parts = []
        for ours, theirs in zip(self.logits.split(CHUNK), base.logits.split(CHUNK), strict=True):
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            parts.append((theirs.exp() * (theirs - ours)).sum(-1))
        return torch.cat(parts).clamp(min=0)

    def top(self, tokenizer: PreTrainedTokenizerBase) -> list[list[list[Any]]]:
        """For each token shown, the most probable next ones: [text, probability]."""
        found = [rows.softmax(-1).topk(min(TOP, rows.shape[-1])) for rows in self.logits.split(CHUNK)]
        labels: dict[int, str] = {}
        lines = []
        for probabilities, ids in found:
            for row_probabilities, row_ids in zip(probabilities.tolist(), ids.tolist(), strict=True):
                for token_id in row_ids:
                    labels.setdefault(token_id, token_label(tokenizer, token_id))
                pairs = zip(row_ids, row_probabilities, strict=True)
                lines.append([[labels[token_id], round(probability, 4)] for token_id, probability in pairs])
        return lines

    def nbytes(self) -> int:
        return self.logits.nbytes


def next_tokens(
    models: dict[str, Predictions], base: Predictions | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What `AttentionMaps` shows of predictions: for each model its figures on the text, and what it expects where."""
    shown = []
    for name, predictions in models.items():
        loss = predictions.loss()
        kl = None if base is None or predictions is base else predictions.kl_from(base)
        same_size = base is not None and predictions.logits.shape == base.logits.shape
        agreement = (predictions.logits.argmax(-1) == base.logits.argmax(-1)).float().mean() if same_size else None
        shown.append(
            {
                "name": name,
                "perplexity": None if loss is None else round(math.exp(loss), 3),
                "kl": None if kl is None else round(float(kl.mean()), 5),
                "agreement": None if kl is None or agreement is None else round(float(agreement), 4),
                "kls": None if kl is None else [round(value, 4) for value in kl.tolist()],
                "top": predictions.top(tokenizer),
            }
        )
    return {"models": shown}
