"""How a column differs from what its base would have said."""

from __future__ import annotations

import torch
from torch import Tensor

from .models import LoadedModel
from .runs import Column, Run, TokenScore
from .text import token_label

TOP = 5
CHUNK = 64  # positions whose full distributions are compared at once


@torch.inference_mode()
def score(loaded: LoadedModel, column: Column) -> list[TokenScore]:
    """One score for each generated token, none if the base is not known; both models read the column's own text."""
    if loaded.base is None:
        return []
    model_logits = _logits(loaded, column)
    base_logits = model_logits if loaded.base is loaded else _logits(loaded.base, column)
    scores: list[TokenScore] = []
    for start in range(0, column.generated, CHUNK):
        rows = slice(start, min(start + CHUNK, column.generated))
        written = torch.tensor(column.token_ids[column.prompt_length :][rows])
        scores += _compare(loaded, model_logits[rows], base_logits[rows], written)
    return scores


def _logits(loaded: LoadedModel, column: Column) -> Tensor:
    """(generated, V) logits from which each generated token was, or would have been, drawn."""
    model = loaded.model
    input_ids = torch.tensor([column.token_ids[:-1]], device=model.device)
    with loaded.lock:
        return model(input_ids, use_cache=False, logits_to_keep=column.generated).logits[0].float().cpu()


def _compare(loaded: LoadedModel, model_logits: Tensor, base_logits: Tensor, written: Tensor) -> list[TokenScore]:
    model, base = model_logits.log_softmax(-1), base_logits.log_softmax(-1)
    kl = (base.exp() * (base - model)).sum(-1).clamp(min=0)  # rounding can take it just below
    columns = [kl.tolist()]
    for log_probabilities in (model, base):
        own = log_probabilities.gather(1, written[:, None])
        columns += [own.exp()[:, 0].tolist(), ((log_probabilities > own).sum(-1) + 1).tolist()]
    tops = [_top(loaded, log_probabilities) for log_probabilities in (model, base)]
    return [TokenScore(*values) for values in zip(*columns, *tops, strict=True)]


def _top(loaded: LoadedModel, log_probabilities: Tensor) -> list[tuple[tuple[str, float], ...]]:
    probabilities, ids = log_probabilities.exp().topk(TOP)
    return [
        tuple(
            (token_label(loaded.tokenizer, token_id), probability) for token_id, probability in zip(*row, strict=True)
        )
        for row in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


def mark_parting(run: Run) -> None:
    """Names the reference column, the first plain model or else the first, and marks where the others part from it."""
    written = [column for column in run.columns if column.generated > 0]
    if not written:
        return
    reference = next((column for column in written if column.method == "softmax"), written[0])
    run.reference = reference.name
    for column in written:
        column.parts_at = parting(reference.tokens, column.tokens)


def parting(reference: list[str], other: list[str]) -> int | None:
    """The first index at which two texts differ, or None; where one only ends before the other they do not part."""
    return next((i for i, (a, b) in enumerate(zip(reference, other, strict=False)) if a != b), None)
