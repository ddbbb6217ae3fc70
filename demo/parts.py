"""What happens inside a mechanism, as maps, curves and tables; told by shapes alone, so that any method fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention import Mechanism
from attention.mechanism import repeat_heads
from attention.reference import softmax_weights

from .components.maps import MapView, RowsView, TableView, pack_triangle

MOST_CURVES = 8
MADE_HERE = ("exact", "error")
TITLES = {
    "exact": "Softmax instead",
    "mask": "Effective mask",
    "compressed": "Compressed branch",
    "selected": "Selected branch",
    "window": "Window branch",
}
NOTES = {
    "exact": "What softmax would do with this layer's own queries and keys.",
    "mask": "The learned weight of every key, before the scores come in: 0 is never read.",
    "compressed": "Branch that reads short summaries; a summary's weight is spread over its tokens.",
    "selected": "Branch that reads a few whole blocks.",
    "window": "Branch that reads the latest tokens.",
    "selected_blocks": "The blocks that the selected branch picked for each token.",
    "gates": "How much each branch counts; each gate is between 0 and 1, and they need not sum to 1.",
}


@dataclass
class Parts:
    """What a mechanism tells of one head.

    Attributes:
        exact: (W, W) softmax over the mechanism's own queries and keys.
    """

    exact: Tensor
    maps: list[MapView] = field(default_factory=list)
    rows: list[RowsView] = field(default_factory=list)
    tables: list[TableView] = field(default_factory=list)


def explain(mechanism: Mechanism, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor, head: int, shown: slice) -> Parts:
    """What `Mechanism.attention_parts` and softmax over the same queries and keys give for one head.

    Softmax and the distance from it are made here for every method, so the parts that say the same are passed over.

    Args:
        q, k, x, tokens: what reaches the mechanism, one row.
        head: the query head.
        shown: the tokens shown.
    """
    length = q.shape[2]
    exact = softmax_weights(q[:, head, None].float(), repeat_heads(k, q.shape[1])[:, head, None].float())[0, 0]
    parts = Parts(exact[shown, shown])
    for name, tensor in mechanism.attention_parts(q, k, x, tokens).items():
        if name not in MADE_HERE:
            _add(parts, mechanism, name, _of_head(tensor, head, q.shape[1]), length, shown)
    if mechanism.config.method != "softmax":
        parts.maps.append(_map("exact", parts.exact))
    return parts


def _of_head(tensor: Tensor, head: int, heads: int) -> Tensor:
    """Drops the batch, and picks a head where there is a dimension for them."""
    if tensor.shape[:1] == (1,):
        tensor = tensor[0]
    if tensor.shape[:1] in ((1,), (heads,)):
        return tensor[min(head, len(tensor) - 1)]
    groups = heads // len(tensor) if tensor.ndim and len(tensor) and heads % len(tensor) == 0 else 0
    return tensor[head // groups] if groups else tensor


def _add(parts: Parts, mechanism: Mechanism, name: str, tensor: Tensor, length: int, shown: slice) -> None:
    """Adds one head's tensor as what its shape says that it is; a shape that says nothing is left out."""
    match tuple(tensor.shape):
        case (rows, columns) if rows == columns == length:
            parts.maps.append(_map(name, tensor[shown, shown].float()))
        case (rows, blocks) if rows == length and tensor.dtype == torch.bool:
            size = getattr(mechanism.config, "select_block", math.ceil(length / blocks))
            keys = tensor.repeat_interleave(size, dim=1)[:, :length].tril()
            parts.maps.append(_map(name, keys[shown, shown].float()))
        case (rows, columns) if rows == length and columns <= MOST_CURVES:
            names = mechanism.branches if len(mechanism.branches) == columns else range(columns)
            parts.rows.append(_curves(name, tensor[shown].float(), [str(each) for each in names]))
        case (rows,) if rows == length:
            parts.rows.append(_curves(name, tensor[shown, None].float(), [_words(name)]))


def _words(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def _map(name: str, matrix: Tensor) -> MapView:
    return {
        "key": name,
        "title": _words(name),
        "note": NOTES.get(name, ""),
        "kind": "difference" if bool((matrix < 0).any()) else "share",
        "data": pack_triangle(matrix),
    }


def _curves(name: str, values: Tensor, names: list[str]) -> RowsView:
    return {
        "title": _words(name),
        "note": NOTES.get(name, ""),
        "min": 0,
        "series": [
            {"name": each, "color": index, "values": plain(column)}
            for index, (each, column) in enumerate(zip(names, values.T, strict=True), 1)
        ],
    }


def weight_tables(mechanisms: Sequence[Mechanism], layer: int) -> list[TableView]:
    """What the layers learned, from `Mechanism.summary`: all layers, heads averaged, and one layer head by head."""
    summaries = [
        {name: torch.tensor(values, dtype=torch.float32) for name, values in mechanism.summary().items()}
        for mechanism in mechanisms
    ]
    names = [name for name, values in summaries[layer].items() if values.ndim == 1 and values.numel()]
    if not names:
        return []
    by_layer = {name: torch.stack([summary[name].mean() for summary in summaries]) for name in names}
    tables = [_table("By layer", "Mean over the heads of each layer.", "layer", by_layer)]
    heads = {name: summaries[layer][name] for name in names}
    if len({len(values) for values in heads.values()}) == 1 and len(heads[names[0]]) > 1:
        tables.append(_table(f"Layer {layer}, by head", "The layer that is open.", "head", heads))
    return tables


def _table(title: str, note: str, column: str, rows: dict[str, Tensor]) -> TableView:
    count = max(map(len, rows.values()))
    return {
        "title": title,
        "note": note,
        "columns": [f"{column} {index}" for index in range(count)],
        "rows": [{"name": name, "values": plain(values)} for name, values in rows.items()],
    }


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """½ Σ |a − b| over the keys: 0 for the same row, 1 for rows that sum to 1 and share no key."""
    return (a - b).abs().sum(-1) / 2


def plain(values: Tensor) -> list[float]:
    """A vector as rounded numbers for JSON."""
    return [round(value, 5) for value in values.tolist()]
