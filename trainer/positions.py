"""Learned position embeddings: a table of more rows, and positions that skip, to learn far ones on short texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from attention.variant import position_table

TAIL = 0.5  # share of the old table, its last rows, that `repeat` and `stretch` go on with


def extend_positions(model: PreTrainedModel, positions: int, start: str) -> None:
    """Gives a model `positions` learned position embeddings in place of its P, in place.

    Args:
        start: "interpolate" stretches the old rows over the new range, linearly (arXiv 2306.15595): distances shrink by
            P / positions. "stretch" does so with the last `TAIL` of them and keeps the others: short texts stay as
            they are. "repeat" keeps all and repeats the last `TAIL` of them beyond: distances stay, and far keys look
            like near ones.

    Raises:
        ValueError: if the model has no such table, or one of more rows.
    """
    table, old = position_table(model), model.config.max_position_embeddings
    if table is None:
        raise ValueError(f"positions needs a learned table of positions, which {model.config.model_type} has not")
    if positions < old:
        raise ValueError(f"positions must not be fewer than the model's {old}; got {positions}")
    spare = table.num_embeddings - old  # rows that some families keep before those of positions
    with torch.no_grad():
        rows = STARTS[start](table.weight[spare:], positions)
        table.weight = nn.Parameter(torch.cat([table.weight[:spare], rows]))
    table.num_embeddings = spare + positions
    model.config.max_position_embeddings = positions


def interpolated(rows: Tensor, count: int) -> Tensor:
    """(P, E) rows, as `count` rows on the straight lines between them; the first and the last stay."""
    return F.interpolate(rows.t()[None], size=count, mode="linear", align_corners=True)[0].t().contiguous()


def stretched(rows: Tensor, count: int) -> Tensor:
    """(P, E) rows, the last `TAIL` of them `interpolated` so that there are `count`; those before stay."""
    first = _tail(rows)
    return torch.cat([rows[:first], interpolated(rows[first:], count - first)])


def repeated(rows: Tensor, count: int) -> Tensor:
    """(P, E) rows, and beyond them the last `TAIL` of them again and again, up to `count` rows."""
    old, first = rows.shape[0], _tail(rows)
    places = torch.arange(count, device=rows.device)
    return rows[torch.where(places < old, places, first + (places - first) % (old - first))]


def _tail(rows: Tensor) -> int:
    """Where the last `TAIL` of the rows begin."""
    return rows.shape[0] - max(1, round(TAIL * rows.shape[0]))


STARTS = {"interpolate": interpolated, "stretch": stretched, "repeat": repeated}


def skipping_positions(input_ids: Tensor, positions: int) -> Tensor:
    """(B, T) positions below `positions` that skip once in each sequence, as PoSE draws them (arXiv 2309.10400).

    A sequence's first part, of a random length, starts at 0; the rest goes on after a random number of positions. So
    a model sees far positions, and far distances, at the cost of T tokens. Drawn from torch's CPU generator.
    """
    batch, length = input_ids.shape
    cut = torch.randint(1, length, (batch, 1))
    skipped = torch.randint(0, positions - length + 1, (batch, 1))
    places = torch.arange(length).expand(batch, -1)
    return (places + skipped * (places >= cut)).to(input_ids.device)
